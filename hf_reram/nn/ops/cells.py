"""The autograd functions of the weights: what the cells hold, and how far retention moves it."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...device.moments import WeightError
from ...device.retention import horner
from .chunks import evaluate_polynomial, row_pieces
from .reference import held_weight


def map_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """``clamp(W, -w_scale, w_scale)``: the weights that the cells can hold. Where all are within, as they are after
    every step of training, that is ``W`` itself, which costs no pass: on CPU, where looking is cheap, it is looked at.

    Args:
        weight: any shape. scale: w_scale, broadcastable to it.
    """
    if torch.compiler.is_compiling():
        return held_weight(weight, scale)
    if weight.device.type == "cpu" and _all_within(weight.detach(), scale):
        return weight
    return MapWeight.apply(weight, scale)


def _all_within(weight: Tensor, scale: Tensor) -> bool:
    shape = (1,) * (weight.dim() - scale.dim()) + scale.shape
    dims = [d for d, size in enumerate(shape) if size == 1]
    scale = scale.view(shape)
    if not dims:
        return bool((weight.abs() <= scale).all())
    return bool((weight.amax(dims, True) <= scale).all() and (weight.amin(dims, True) >= -scale).all())


class MapWeight(Function):
    """:func:`map_weight` where some weights are beyond; these get no gradient."""

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return torch.clamp(weight, -scale, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scale = ctx.saved_tensors
        result = torch.empty_like(weight)
        for w, k, g, out, ratio in _weight_pieces(weight, scale, grad, result):
            _zero_clipped(out.copy_(g), _magnitude(w, k, ratio, clip=False))
        return result, None


class OffsetOutput(Function):
    """``(V, V o)``: weights as they are held, and what they make of their layer's input offset, (output channels,).

    The gradient of the second, an outer product of the weight's size, is added to that of the first in place: V goes
    into matrix products and :class:`DriftedWeight` only, whose gradients nothing else refers to.

    Args:
        held: V. layer: a crossbar, whose weight has V's shape.
    """

    @staticmethod
    def forward(ctx, held: Tensor, layer) -> tuple[Tensor, Tensor]:
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        return held.view_as(held), layer.offset_output(held)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_output: Tensor | None):
        if grad_output is None:
            return grad, None
        outer = ctx.layer.offset_outer(grad_output)
        return torch.mul(*outer).expand(ctx.layer.weight.shape) if grad is None else grad.addcmul_(*outer), None


class WeightVariance(Function):
    """``s²(W) = w_scale² P(|W| / w_scale)``, the retention variance of each weight.

    Args:
        weight: any shape. scale: w_scale, broadcastable to it; where it is 0 the result is 0.
        error: whose variance P is.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, error: WeightError) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.error = error
        result = torch.empty_like(weight)
        for w, k, out, a in _weight_pieces(weight, scale, result):
            _square(error, _magnitude(w, k, a), out).mul_(k * k)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scale = ctx.saved_tensors
        result = torch.empty_like(weight)
        for w, k, out, g, a in _weight_pieces(weight, scale, result, grad):
            _variance_slope(ctx.error, w, k, out, a).mul_(g)
        return result, None, None


class DriftedWeight(Function):
    """``(W' + m(W') + s(W') ε, s²(W'))`` with ``W' = clamp(W, -w_scale, w_scale)``: weights as found after
    the retention time, for given variates ε, and their variance, both differentiable with respect to W.

    Args:
        weight: any shape, at least float32. scale: w_scale, broadcastable to it. noise: ε, of the weight's shape.
        error: of one time. variance: whether to return the variance, else None in its place.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, noise: Tensor, error: WeightError, variance: bool):
        # With W' = sign k a and s = k sqrt P(a), the derivative is kept instead of the noise: it costs the same memory.
        drifted, learned = torch.empty_like(weight), ctx.needs_input_grad[0]
        slope = torch.empty_like(weight) if learned else drifted  # beside an adapter the cells are frozen
        squares = torch.empty_like(weight) if variance else drifted
        mean = error.means[0]
        for w, k, n, d, out, square, a in _weight_pieces(weight, scale, noise, slope, drifted, squares):
            ratio = _magnitude(w, k, torch.empty_like(a), clip=False)
            torch.clamp(ratio, max=1.0, out=a)
            _square(error, a, out, d if learned else None)
            if variance:
                torch.mul(out, k * k, out=square)
            std, sign = out.clamp_(min=1e-30).sqrt_(), w.sign()
            if learned:
                d.div_(std).mul_(n).mul_(sign).add_(1.0)
                if any(mean):
                    d.add_(horner(_derivative(mean), a))
                _zero_clipped(d, ratio)
            if any(mean):
                a.add_(horner(mean, a))
            out.mul_(n).add_(a.mul_(sign)).mul_(k)
        ctx.save_for_backward(*(weight, scale, slope) if learned else ())
        ctx.error = error
        ctx.set_materialize_grads(False)
        return drifted, squares if variance else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_variance: Tensor | None):
        weight, scale, slope = ctx.saved_tensors
        if grad is None:
            grad = weight.new_zeros(()).expand(weight.shape)
        if grad_variance is None:
            return grad * slope, None, None, None, None
        result = torch.empty_like(weight)
        for w, k, g, d, gv, out, a in _weight_pieces(weight, scale, grad, slope, grad_variance, result):
            slope = _variance_slope(ctx.error, w, k, torch.empty_like(a), a)
            torch.mul(g, d, out=out).addcmul_(slope, gv)
        return result, None, None, None, None


def _variance_slope(error: WeightError, weight: Tensor, scale: Tensor, out: Tensor, work: Tensor) -> Tensor:
    """d s²/dW into ``out``."""
    ratio = _magnitude(weight, scale, torch.empty_like(work), clip=False)
    _square(error, torch.clamp(ratio, max=1.0), work, out)
    return _zero_clipped(out.mul_(weight.sign()), ratio).mul_(2 * scale)


def _zero_clipped(slope: Tensor, ratio: Tensor) -> Tensor:
    """Zero where |W| is above w_scale; a weight at its very edge keeps its gradient, so that it can come back."""
    edge = 1.0 + 4 * torch.finfo(slope.dtype).eps
    return torch.ops.aten.hardtanh_backward.grad_input(slope, ratio, -edge, edge, grad_input=slope)


def _square(error: WeightError, a: Tensor, square: Tensor, half: Tensor | None = None) -> Tensor:
    """P(a) into ``square``, and P'(a)/2 into ``half`` where it is wanted."""
    if error.std is None:
        if half is not None:
            evaluate_polynomial(error.variance_slope, a, half).mul_(0.5)
        return evaluate_polynomial(error.variance, a, square)
    std = evaluate_polynomial(error.std, a, square)
    if half is not None:
        evaluate_polynomial(_derivative(error.std), a, half).mul_(std)
    return square.mul_(std).add_(error.floor)


def _derivative(coefficients: tuple) -> tuple:
    return tuple(i * c for i, c in enumerate(coefficients))[1:] or (0.0,)


def weight_mean(weight: Tensor, scale: Tensor, mean: tuple) -> Tensor:
    """``m(W) = w_scale · M(|W| / w_scale) · sign(W)``, the retention shift of each weight; arguments as above."""
    a = (weight / scale.clamp(min=1e-30)).abs().clamp(max=1.0)
    return horner(mean, a) * scale * weight.sign()


def _weight_pieces(weight: Tensor, scale: Tensor, *others: Tensor):
    """Row slices of a weight, its scale, further tensors of the weight's shape, and a work tensor."""
    if weight.device.type != "cpu":
        yield (weight, scale, *others, torch.empty_like(weight))
        return
    # A scale of fewer dimensions lies along the last one (Conv1D), even where the weight is square.
    by_row = scale.dim() == weight.dim() and len(scale) == len(weight)
    for part, work in row_pieces(weight):
        yield (weight[part], scale[part] if by_row else scale, *(t[part] for t in others), work)


def _magnitude(weight: Tensor, scale: Tensor, out: Tensor, clip: bool = True) -> Tensor:
    """|W| / w_scale. A clipped weight is above 1, so it is told from a held one, which has a gradient."""
    torch.div(weight, scale.clamp(min=1e-30), out=out).abs_()
    return out.clamp_(max=1.0) if clip else out
