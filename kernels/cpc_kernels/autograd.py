"""How the ops meet autograd: who listens, who asks for gradients, and what is refused.

In eager mode an op runs without its registration, whose Python costs several times a small batch.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad


def undisturbed() -> bool:
    """Nobody compiles, traces, transforms or intercepts."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def plainly_eager(*tensors: Tensor) -> bool:
    """Plain tensors, undisturbed."""
    return undisturbed() and all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu | t.is_cuda for t in tensors)


def as_written(body):
    """A function without autocast, which would multiply in 16 bits what it says in float32, or fail half-way."""

    @functools.wraps(body)
    def run(*given, **options):
        device = next(one for one in given if isinstance(one, Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return body(*given, **options)
        with torch.autocast(device, enabled=False):
            return body(*given, **options)

    return run


def plain_form(compute, save, backward, gradients, registered):
    """The autograd node made of an op's parts; `registered` gives the gradients to whom someone listens, or
    differentiates once more."""

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = compute(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)
            plain = undisturbed() and not batched and not torch.is_grad_enabled()
            return backward(ctx, *grads, gradients=gradients if plain else registered)

    return Plain.apply


def once_differentiable(op, name: str) -> None:
    """A second derivative is an error, not a wrong number."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f'{name}: second derivatives are not implemented by this implementation; impl="reference" has them.'
        )

    op.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


def transformed() -> bool:
    """Inside torch.func's vmap, grad and the like; a compiler that is looking has a world of its own."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_transforms(op: str, impl: str, *given: float | Tensor) -> None:
    """torch.func's derivatives end in an error that names nothing, and those of forward mode in silent zeros."""
    if impl == "reference" or torch.compiler.is_compiling():
        return
    functional, forward = torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0
    for tensor in [t for t in given if isinstance(t, Tensor)] if functional or forward else ():
        derived = forward and forward_ad.unpack_dual(tensor).tangent is not None
        while functional and not derived and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            derived = torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if derived:
            raise RuntimeError(
                f"{op}: torch.func's derivatives and forward mode do not go through this op; use backward() or "
                'torch.autograd.grad, or impl="reference", which takes every transform.'
            )


def learns(*tensors: Tensor) -> bool:
    """Someone will ask for gradients; under vmap, whose tensors do not tell, if gradients are on at all."""
    return torch.is_grad_enabled() and (transformed() or any(t.requires_grad for t in tensors))
