"""The natural gradient by conjugate gradients. Knows no SB3 algorithm, no logger and no environment."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy

import numpy as np
import torch as th
from torch import nn

from sb3_reinforce.batch import Chunks
from sb3_reinforce.batch_policy import BatchPolicy, divergence
from sb3_reinforce.parallel.processes import all_sum


def flatten(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """
    Lay tensors end to end, whatever their memory looks like (that of gradients of convolutions is not contiguous).

    :param tensors: Tensors
    :return: Their elements, shape ``(n_elements,)``
    """
    return th.cat([tensor.reshape(-1) for tensor in tensors])


def fisher_vector_product(
    policy: BatchPolicy, parameters: Sequence[nn.Parameter], chunks: Chunks, total_steps: int, damping: float
) -> Callable[[np.ndarray], np.ndarray]:
    """
    Make the function ``v -> (F + damping I) v``, with the Fisher information ``F`` of the policy, a mean over the steps of
    all processes. ``F`` is never made: its product is that of the Hessian of the KL divergence (Schulman et al., Trust
    region policy optimization, 2015, appendix C).

    :param policy: Policy
    :param parameters: The parameters that it depends on
    :param chunks: The batch in parts
    :param total_steps: Number of steps of all processes
    :param damping: Multiple of the identity that is added to ``F``
    :return: The function, of vectors of shape ``(n_parameters,)`` in double precision. It raises ``ValueError`` if a
        product is not finite
    :raises NotImplementedError: If there is no formula for the KL divergence of the policy
    """

    def kl_gradients() -> Iterator[th.Tensor]:
        for batch in chunks:
            with th.no_grad():
                # The policy has a single distribution object, which the next call changes
                fixed = copy(policy.distribution(batch))
            kl = divergence(fixed, policy.distribution(batch)).sum()
            yield flatten(th.autograd.grad(kl, parameters, create_graph=True))

    # A single part keeps its graph from one product to the next
    kept = list(kl_gradients()) if len(chunks) <= 1 else None

    def product(vector: np.ndarray) -> np.ndarray:
        total = np.zeros_like(vector)
        direction = th.as_tensor(vector).to(parameters[0])
        for kl_gradient in kl_gradients() if kept is None else kept:
            row = th.autograd.grad(kl_gradient @ direction, parameters, retain_graph=kept is not None)
            total += flatten(row).cpu().numpy()
        result = all_sum(total) / total_steps + damping * vector
        if not np.isfinite(result).all():
            raise ValueError(
                "A product with the Fisher matrix is not finite: no step was made. A standard deviation near zero, or "
                "observations that are too large, are the usual reasons"
            )
        return result

    return product


def natural_gradient(
    gradient: Sequence[th.Tensor], product: Callable[[np.ndarray], np.ndarray], max_steps: int
) -> tuple[list[th.Tensor], float]:
    """
    Solve ``(F + damping I) x = g`` (Kakade, A natural policy gradient, 2001) by conjugate gradients.

    :param gradient: Gradient ``g`` with respect to each parameter
    :param product: Result of :func:`fisher_vector_product`
    :param max_steps: Maximum number of steps of the conjugate gradient method
    :return: Natural gradient ``x`` with respect to each parameter, and the curvature ``g^T x``: a step ``a x`` makes the
        divergence ``a^2 / 2 x^T (F + damping I) x = a^2 / 2 g^T x``, to leading order
    """
    # Imported here for the time that it takes
    from scipy.sparse.linalg import LinearOperator, cg

    g = flatten(gradient).cpu().numpy().astype(np.float64)
    operator = LinearOperator((len(g), len(g)), product, dtype=g.dtype)
    x, _ = cg(operator, g, maxiter=max_steps)
    parts = th.as_tensor(x).to(gradient[0]).split([part.numel() for part in gradient])
    return [part.view(like.shape) for part, like in zip(parts, gradient, strict=True)], float(g @ x)
