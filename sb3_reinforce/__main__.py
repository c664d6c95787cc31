"""``python -m sb3_reinforce``, which is the same as ``sb3-reinforce``."""

from sb3_reinforce.compare.cli import COMMANDS
from sb3_reinforce.zoo import cli


def main() -> None:
    """Run ``sb3-reinforce COMMAND [ARGUMENTS]``."""
    cli.main(COMMANDS)


if __name__ == "__main__":
    main()
