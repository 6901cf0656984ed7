"""The torch functions that networks call, by name, each of one tensor (3, 4); those without a derivative in REFUSED."""

import torch
from torch import Tensor
from torch.nn import functional as F

D = torch.float64
I = torch.arange(3)
M = torch.arange(12).view(3, 4) % 2 == 0
P = torch.linspace(0.3, 1.7, 12, dtype=D).view(3, 4)
Q = torch.linspace(-1.0, 1.0, 16, dtype=D).view(4, 4)
C1, C2, C3 = (torch.linspace(-1.0, 1.0, 3**n * 4, dtype=D).view(2, 2, *[3] * n) for n in (1, 2, 3))
IMAGE = (1, 2, 6, 6)

ONE = """abs acos acosh arctan asin asinh atan atanh angle ceil conj_physical cos cosh deg2rad digamma erf erfc erfinv
    exp exp2 expm1 fix floor frac i0 isfinite isnan lgamma log log10 log1p log2 logit nan_to_num neg positive rad2deg
    reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt square tan tanh trunc amax amin aminmax argmax
    argmin argsort max min mean median nanmean nanmedian nansum norm prod std std_mean sum unique var var_mean sort
    mode diag diff fliplr flipud triu tril ravel rot90 t unbind count_nonzero nonzero corrcoef cov"""
ALONG = """logcumsumexp cummax cummin cumprod cumsum logsumexp sort mode max min median nanmedian argsort amax amin any
    all softmax log_softmax unbind"""
ACTIVATIONS = """celu elu gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish normalize relu relu6 selu
    silu softplus softshrink hardshrink softsign tanhshrink glu"""
TWO = """add atan2 copysign div fmax fmin fmod hypot logaddexp logaddexp2 maximum minimum mul remainder sub xlogy
    true_divide"""


def along(name):
    return lambda x: getattr(torch, name)(x, 0)


def of_two(name):
    function = getattr(torch, name)
    return lambda x: (function(x, P), function(P, x), function(x, x.cos()))


NAMED = {name: getattr(torch, name) for name in ONE.split()}
NAMED |= {f"{name} over a dimension": along(name) for name in ALONG.split()}
NAMED |= {f"F.{name}": getattr(F, name) for name in ACTIVATIONS.split()}
NAMED |= {f"{name} with a tensor": of_two(name) for name in TWO.split()}
OTHERS = {
    "activations of a number": lambda x: F.relu(x.mean()) + F.gelu(x[0, 0]) * F.silu(x[0, 1]),
    "addbmm": lambda x: torch.addbmm(x @ Q, x[None], Q[None]),
    "addcdiv": lambda x: torch.addcdiv(x, P, x + 9.0, value=0.3),
    "addcmul": lambda x: torch.addcmul(P, x, x, value=0.3),
    "addmv": lambda x: torch.addmv(P[:, 0], x, Q[0]),
    "addr": lambda x: torch.addr(P, x[:, 0], x[0]),
    "as_strided": lambda x: torch.as_strided(x * 1.0, (2, 2), (1, 2)),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], Q[None]),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) * x,
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(2, 4, 4, dtype=D)),
    "block_diag": lambda x: torch.block_diag(x, P),
    "broadcast_to": lambda x: torch.broadcast_to(x, (2, 3, 4)),
    "bucketize": lambda x: torch.bucketize(x, P[0]),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "cdist": lambda x: torch.cdist(x, P),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp by a tensor": lambda x: x.clamp(min=P - 1.0),
    "column_stack": lambda x: torch.column_stack([x, P]),
    "cat and scatter of integers": lambda x: (torch.cat([x, M, I[:, None]], 1), x.slice_scatter(I[:, None], 1, 0, 1)),
    "complex": lambda x: torch.complex(x, P) * 1j,
    "complex tanh and sigmoid": lambda x: torch.view_as_real((1j * x).tanh() + (P + 1j * x).sigmoid()),
    "cosine_similarity": lambda x: F.cosine_similarity(x, P),
    "cross": lambda x: torch.linalg.cross(x[:, :3], P[:, :3]),
    "diag_embed": torch.diag_embed,
    "diagonal_scatter": lambda x: torch.diagonal_scatter(x, P[:, 0]),
    "dist": lambda x: torch.dist(x, P),
    "dstack": lambda x: torch.dstack([x, P]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "embedding of weights": lambda x: F.embedding(torch.tensor([[0, 2]]), x),
    "expand_as": lambda x: x[:1].expand_as(P),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x)),
    "float_power": lambda x: torch.float_power(x * x + 1.0, 1.5),
    "fold": lambda x: F.fold(x.view(1, 4, 3), (2, 4), 2),
    "gather": lambda x: x.gather(1, torch.zeros(3, 2, dtype=torch.long)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "heaviside": lambda x: torch.heaviside(x, P),
    "histc": lambda x: torch.histc(x, 4),
    "index_add": lambda x: P.index_add(0, I, x) + x.index_add(0, I, P),
    "index_copy": lambda x: x.index_copy(0, I[:1], P[:1]),
    "index_fill": lambda x: x.index_fill(0, I[:1], 2.0),
    "index_put": lambda x: x.index_put((I,), P, accumulate=True),
    "inner": lambda x: torch.inner(x, P),
    "instance_norm": lambda x: F.instance_norm(x.view(1, 3, 4)),
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2.0, mode="bilinear"),
    "interpolate nearest": lambda x: F.interpolate(x[None], scale_factor=2.0),
    "isclose": lambda x: torch.isclose(x, P),
    "kron": lambda x: torch.kron(x, P),
    "kthvalue": lambda x: x.kthvalue(2, dim=0),
    "kthvalue that keeps a dimension": lambda x: torch.kthvalue(x, 2, 0, True),
    "lerp": lambda x: torch.lerp(x, P, 0.3) + torch.lerp(P, P, x),
    "linalg norms": lambda x: (torch.linalg.norm(x), torch.linalg.vector_norm(x, 3, 0), torch.linalg.matrix_norm(x)),
    "local_response_norm": lambda x: F.local_response_norm(x.view(1, 3, 4), 2),
    "lp_pool1d": lambda x: F.lp_pool1d(x[None], 2, 2),
    "masked_fill": lambda x: x.masked_fill(M, -torch.inf).softmax(-1),
    "masked_scatter": lambda x: x.masked_scatter(M, P),
    "masked_select": lambda x: x.masked_select(M),
    "matrix_exp": lambda x: torch.matrix_exp(x[:, :3]),
    "max of two": lambda x: torch.max(x, P - 1.0),
    "median that keeps a dimension": lambda x: x.median(1, keepdim=True),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    "moveaxis": lambda x: x.moveaxis(0, 1),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 2),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "normal": lambda x: torch.normal(x, 1.0),
    "one_hot": lambda x: F.one_hot(x.argmax(-1), 4) * x,
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad reflect": lambda x: F.pad(x[None], (1, 2), mode="reflect"),
    "pairwise_distance": lambda x: F.pairwise_distance(x, P),
    "pow of a negative base": lambda x: (-x.abs() - 0.1) ** 3.0,
    "pow by a stream": lambda x: 2.0**x + P**x,
    "prelu": lambda x: F.prelu(x, P[0, :1]),
    "put": lambda x: x.put(I, P[:, 0]),
    "quantile": lambda x: x.quantile(0.3, dim=0),
    "renorm": lambda x: x.renorm(2, 0, 0.5),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "rms_norm": lambda x: F.rms_norm(x, (4,), P[0]),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "scatter": lambda x: x.scatter(1, torch.zeros(3, 1, dtype=torch.long), P) + P.scatter(0, I[None, :2], x),
    "scatter_add": lambda x: P.scatter_add(0, I[:, None].expand(3, 4), x),
    "scatter_reduce": lambda x: x.scatter_reduce(0, I[:, None].expand(3, 4), P, "mean"),
    "searchsorted": lambda x: torch.searchsorted(P[0], x),
    "select_scatter": lambda x: x.select_scatter(P[0], 0, 1),
    "slice_scatter": lambda x: P.slice_scatter(x[:2], 0, 0, 2),
    "sort descending": lambda x: torch.sort(x, dim=0, descending=True, stable=True),
    "spread along dimensions": lambda x: (
        x.std(), x.var(0), x.std(1, False, True), x.std(False), torch.var(x, (0, 1), correction=0),
        torch.std_mean(x, dim=-1, keepdim=True), torch.var_mean(x, 0, unbiased=False), (x[:, :1] * 0.0).std(0),
    ),
    "glu along a dimension": lambda x: (F.glu(x, 1), F.glu(x[:2], dim=0)),
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "solve": lambda x: torch.linalg.solve(Q + torch.eye(4, dtype=D) * 3.0, x.mT),
    "inv": lambda x: torch.linalg.inv(x[:, :3] + 5.0 * torch.eye(3, dtype=D)),
    "swapdims": lambda x: x.swapdims(0, 1),
    "take": lambda x: x.take(I),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(-1), -1),
    "tensordot": lambda x: torch.tensordot(x, P, dims=([1], [1])),
    "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "topk": lambda x: x.topk(2, dim=0),
    "topk of the smallest": lambda x: torch.topk(x, 2, -1, False),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "F.unfold": lambda x: F.unfold(x.view(1, 1, 3, 4), 2),
    "vander": lambda x: torch.vander(x[0], 3),
    "vdot": lambda x: torch.vdot(x[0], x[1]),
    "view of the bits": lambda x: x.view(torch.int64),
    "where of one argument": lambda x: torch.where(x > 0),
    "by name in any order": lambda x: (
        torch.where(M, other=x, input=P),
        x.where(other=P, condition=M),
        x.masked_fill(value=0.0, mask=M),
        torch.pow(exponent=x, self=2.0),
        torch.pow(exponent=3, input=x),
    ),
    "where broadcast": lambda x: torch.where(M, x[:1], P[:, :1]),
    "where with NaN not taken": lambda x: torch.where(x > 0, x, (x * 0.0 - 1.0).log()),
    "zeros that are filled": lambda x: torch.zeros(3, 4, dtype=D).index_add_(0, I, x) + torch.empty_like(P).copy_(x),
    "branch": lambda x: x if (x > 0).any() else -x,
    "conv1d": lambda x: F.conv1d(x.view(1, 2, 6), C1, stride=2),
    "conv2d": lambda x: F.conv2d(_image(x), C2, P[0, :2], padding=1),
    "conv3d": lambda x: F.conv3d(_image(x)[:, :, None].repeat(1, 1, 3, 1, 1), C3),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x.view(1, 2, 6), C1, stride=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(_image(x), C2),
    "avg_pool2d": lambda x: F.avg_pool2d(_image(x), 2),
    "max_pool1d": lambda x: F.max_pool1d(x[None], 2),
    "max_pool2d": lambda x: F.max_pool2d(_image(x), 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(_image(x), 2),
    "max_pool2d with padding": lambda x: F.max_pool2d(_image(x), 3, 2, 1, ceil_mode=True, return_indices=True),
    "max_pool3d": lambda x: F.max_pool3d(_image(x), 2, stride=1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(_image(x), 2, [1, 2], 1),
    "adaptive_max_pool": lambda x: (F.adaptive_max_pool1d(x[None], 3, True), F.adaptive_max_pool3d(_image(x), 2)),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(_image(x), 2),
    "torch.adaptive_max_pool1d": lambda x: torch.adaptive_max_pool1d(x[None], 2)[0],
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(_image(x), 2, output_size=2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(_image(x).reshape(1, 8, 3, 3), 2),
    "grid_sample": lambda x: F.grid_sample(_image(x), x.view(1, 3, 2, 2), align_corners=False),
    "channel_shuffle": lambda x: F.channel_shuffle(_image(x), 2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm with statistics": lambda x: F.batch_norm(x, P[0].clone(), P[1].clone(), P[2], training=True),
    "multi_head_attention": lambda x: _attention(x),
    "embedding_bag": lambda x: F.embedding_bag(I[None], x),
    "floor_divide": lambda x: x // 2.0,
    "in-place chain": lambda x: (x * 1.0).mul_(P).add_(1.0).clamp_(max=1.5).sqrt_().relu_(),
    "in-place fills": lambda x: (x * 1.0).fill_(2.0) + (x * 1.0).zero_() + (x * 1.0).copy_(P[:1]),
    "in-place random": lambda x: x + (x * 1.0).normal_() + (x * 1.0).uniform_(),
    "in-place by position": lambda x: F.relu((x * 1.0).add_(0.0), True) + F.elu(x * 1.0, 1.0, True),
    "masked_fill_": lambda x: (x * 1.0).masked_fill_(M, 0.0).index_fill_(0, I[:1], 1.0),
    "index_put_": lambda x: (x * 1.0).index_put_((I,), P),
}  # fmt: skip
TABLE = {**NAMED, **OTHERS}
REFUSED = {"embedding_bag", "grid_sample", "floor_divide", "unique", "cdist", "heaviside"}


def _image(x: Tensor) -> Tensor:
    return torch.cat([x.reshape(-1)] * 6).view(IMAGE)


def _attention(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    module = torch.nn.MultiheadAttention(4, 2, dtype=D, dropout=0.3)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module(x[:, None], x[:, None], x[:, None])[0]
