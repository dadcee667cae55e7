"""A call for each rule of `pplgrad/pyro/_tracing/axes.py`: the axes have sizes of their own, so that none is taken for another.

The first word of a name is that of the operation which is meant.
"""

import torch
import torch.nn.functional as F

aten = torch.ops.aten
SAME: int | None = None
"""The size of every axis, for calls in which one may be taken for another."""


def sizes(shape):
    return [SAME or size for size in shape]


def r(*shape):
    """Return distinct positive numbers."""
    return torch.rand(sizes(shape)) + 0.1


def n(*shape):
    return torch.randn(sizes(shape))


def k(high, *shape):
    """Return whole numbers below a bound."""
    return torch.randint(min(high, SAME or high), sizes(shape))


def spd(*shape):
    x = n(*shape)
    return x @ x.mT + torch.eye(x.shape[-1])


def large(*shape):
    """Return parameters of which a draw is nearly sure."""
    return 1e12 * (1 + r(*shape))


def lu(*shape):
    return torch.linalg.lu_factor(spd(*shape))


def x():
    return r(5, 3, 7)


def c():
    return torch.complex(n(5, 3, 7), n(5, 3, 7))


def image(places):
    return n(5, 3, *[11, 7, 13][:places])


def mask(*shape):
    return r(*shape) > 0.5


def by_name(names, *made):
    """Return calls of operations that take the same operands."""

    def call(name):
        return lambda: getattr(aten, name)(*[m() if callable(m) else m for m in made])

    return {name: call(name) for name in names.split()}


def a():
    return r(5, 7)


def square():
    return spd(2, 5, 3, 3)


COPIES = {
    **by_name("clone alias_copy detach_copy tril triu zero lift_fresh_copy lift_fresh alias detach", x),
    "contiguous": lambda: x().mT.contiguous(),
    **by_name("_conj_copy resolve_conj", c),
    "_neg_view_copy": lambda: aten._neg_view_copy(x()),
    "copy": lambda: x().copy_(r(3, 1)),
    "_to_copy": lambda: x().to(torch.float32),
    "expand_copy": lambda: aten.expand_copy(r(3, 1), [5, 3, 7]),
    "fill": lambda: aten.fill(x(), r()[()]),
    "masked_fill": lambda: x().masked_fill(mask(3, 7), 2.0),
    "where": lambda: torch.where(mask(5, 3, 7), r(3, 1), r(7)),
    "transpose_copy": lambda: aten.transpose_copy(x(), 0, -1),
    "t_copy": lambda: aten.t_copy(a()),
    "permute_copy": lambda: aten.permute_copy(x(), [2, 0, -2]),
    **by_name("slice_copy narrow_copy", x, 1, 0, 2),
    "split_copy": lambda: aten.split_copy(x(), 2, 2),
    "split_with_sizes_copy": lambda: aten.split_with_sizes_copy(x(), [2, 5], 2),
    "unsafe_split": lambda: aten.unsafe_split(x(), 2, 2),
    "unsafe_split_with_sizes": lambda: aten.unsafe_split_with_sizes(x(), [2, 5], 2),
    **by_name("unsqueeze_copy unbind_copy", x, 1),
    "select_copy": lambda: aten.select_copy(x(), 1, 2),
    "select_backward": lambda: aten.select_backward(a(), [5, 3, 7], 1, 2),
    "slice_backward": lambda: aten.slice_backward(r(5, 2, 7), [5, 3, 7], 1, 0, 2, 1),
    "unsqueeze_": lambda: (x().unsqueeze_(1), x().unsqueeze_(1).squeeze_(1), a().t_(), x().transpose_(0, 1)),
    "diag_embed": lambda: (torch.diag_embed(x()), torch.diag_embed(x(), dim1=0, dim2=2), torch.diag_embed(x(), 1)),
    "diagonal_backward": lambda: aten.diagonal_backward(a(), [5, 7, 7], 0, 1, 2),
    "diagonal_copy": lambda: aten.diagonal_copy(r(5, 3, 7, 11), 1, 1, -1),
    "repeat": lambda: (x().repeat(1, 2, 1), x().repeat(2, 1, 1, 3)),
    "repeat_interleave": lambda: (aten.repeat_interleave(k(3, 5)), torch.repeat_interleave(x(), 3, 1)),
    "cat": lambda: (torch.cat([x(), r(5, 2, 7)], 1), torch.cat([x(), r(0)], -1)),
    "stack": lambda: (torch.stack([x(), x()]), torch.stack([x(), x()], 2)),
    "flip": lambda: x().flip([0, 2]),
    "roll": lambda: (x().roll(1, 1), x().roll(2)),
    "rot90": lambda: (x().rot90(), x().rot90(2, [1, 2])),
}

RANDOM = {
    **by_name("rand_like randn_like uniform exponential cauchy log_normal random", x),
    "bernoulli": lambda: aten.bernoulli(x() / 2),
    "bernoulli with": lambda: (aten.bernoulli(x(), 0.3), aten.bernoulli(x(), r(3, 1).clamp(max=1))),
    "normal": lambda: (torch.normal(x(), r(3, 1)), torch.normal(x(), 0.1), x().normal_()),
    "normal_functional": lambda: aten.normal_functional(x()),
    "randint_like": lambda: torch.randint_like(x(), 9),
    "geometric": lambda: aten.geometric(x(), 0.3),
    "native_dropout": lambda: torch.native_dropout(x(), 0.5, True),
    "rrelu_with_noise": lambda: aten.rrelu_with_noise(-x(), x(), 0.1, 0.3, True),
    "rrelu_with_noise_functional": lambda: aten.rrelu_with_noise_functional(-x(), x(), 0.1, 0.3, True),
    **by_name("poisson _standard_gamma _sample_dirichlet", lambda: large(5, 3, 7)),
    "binomial": lambda: torch.binomial(100 + k(900, 5, 3, 7).double(), torch.ones(5, 3, 7)),
    "multinomial": lambda: (torch.multinomial(a(), 2), torch.multinomial(a(), 7, True), torch.multinomial(r(7), 2)),
}

ARITHMETIC = {
    **by_name("hardswish log_sigmoid_forward", lambda: n(5, 3, 7)),
    **by_name("floor_divide rsub complex polar _prelu_kernel _add_relu", x, lambda: r(3, 1)),
    **by_name("_standard_gamma_grad hardswish_backward mish_backward", x, x),
    **by_name("_dirichlet_grad log_sigmoid_backward _prelu_kernel_backward", x, x, x),
    **by_name("hardshrink_backward softshrink_backward", x, x, 0.2),
    "floor_divide by": lambda: (x() // 2, x().floor_divide_(0.3), k(9, 5, 3) // 2),
    "rsub from": lambda: 1 - x(),
    **by_name("__ilshift__ __irshift__", lambda: k(9, 5, 3), lambda: k(3, 5, 3)),
    "elu_backward": lambda: aten.elu_backward(x(), 1, 1, 1, False, x()),
    "leaky_relu_backward": lambda: aten.leaky_relu_backward(x(), x(), 0.1, False),
    "hardtanh_backward": lambda: aten.hardtanh_backward(x(), x(), 0, 1),
    "softplus_backward": lambda: aten.softplus_backward(x(), x(), 1, 20),
    "hardsigmoid_backward": lambda: aten.hardsigmoid_backward(x(), x()),
}

REDUCTIONS = {
    **by_name("sum prod all any std var mean max min median nanmedian norm argmax argmin var_mean std_mean", x),
    **by_name("count_nonzero nansum linalg_vector_norm aminmax _aminmax linalg__powsum", x),
    **by_name("trace _pdist_forward", lambda: r(5, 5)),
    **by_name("dot vdot", lambda: r(5), lambda: r(5)),
    **by_name("_is_all_true _is_any_true", lambda: mask(5, 3)),
    **by_name("dist", x, x),
    **{f"{name} along": f for name, f in by_name("all any prod max min median argmax argmin", x, -2).items()},
    **{f"{name} kept": f for name, f in by_name("all any prod max min nanmedian argmax argmin", x, 1, True).items()},
    **{
        f"{name} of": f
        for name, f in by_name("amax amin logsumexp sum nansum mean all any std var", x, [0, -1]).items()
    },
    **by_name("mode count_nonzero _aminmax cumsum cumprod logcumsumexp _logcumsumexp cummax cummin argsort", x, 1),
    "kthvalue": lambda: (x().kthvalue(2), x().kthvalue(2, 1, True)),
    "aminmax along": lambda: (x().aminmax(dim=1), x().aminmax(dim=-1, keepdim=True)),
    "norm along": lambda: (x().norm(dim=1), x().norm(3, (0, 2), True), aten.norm.ScalarOpt_dim(x(), 2, [1])),
    "linalg_vector_norm along": lambda: aten.linalg_vector_norm(x(), 2, [-1], True),
    "linalg__powsum along": lambda: aten.linalg__powsum(x(), 2, [1]),
    "var along": lambda: (x().var((0, 1), correction=0), x().std(2, keepdim=True), torch.var_mean(x(), 1)),
    "std_mean": lambda: (torch.std_mean(x(), (0, -1)), torch.std_mean(x(), correction=0)),
    "max other": lambda: (torch.max(x(), r(3, 1)), torch.min(r(7), x())),
    "sort": lambda: (x().sort(1), x().sort(stable=True, dim=0), x().sort()),
    "argsort stable": lambda: x().argsort(stable=True, dim=0),
    "topk": lambda: (x().topk(2, 1), x().topk(2)),
    "_softmax": lambda: (x().softmax(1), x().log_softmax(-1), aten._safe_softmax(x(), 0)),
    **by_name("_softmax_backward_data _log_softmax_backward_data", x, x, 1, torch.float64),
    "glu": lambda: (F.glu(r(5, 4, 7), 1), aten.glu_backward(r(5, 2, 7), r(5, 4, 7), 1)),
    "linalg_cross": lambda: (torch.linalg.cross(x(), r(5, 3, 1), dim=1), torch.linalg.cross(r(5, 3), r(1, 3))),
    "_fft_c2c": lambda: (torch.fft.fft(c(), dim=1), torch.fft.fft2(c())),
    "_fft_r2c": lambda: (torch.fft.rfft(x(), dim=0), torch.fft.rfft2(x()), torch.fft.fft(x(), dim=1)),
    "_fft_c2r": lambda: (torch.fft.irfft(c(), dim=2), torch.fft.irfft2(c(), dim=(0, 2))),
    "renorm": lambda: x().renorm(2, 1, 0.1),
    "_weight_norm_interface": lambda: (
        aten._weight_norm_interface(x(), r(5)[:, None, None]),
        aten._weight_norm_interface(a(), r(7)[None], 1),
    ),
}

INDICES = {
    "index_select": lambda: (x().index_select(1, k(3, 4)), x().index_select(2, k(7, 7)), r(5).index_select(0, k(5, 5))),
    "gather": lambda: (x().gather(1, k(3, 5, 4, 7)), x().gather(2, k(7, 2, 3, 7)), x().gather(0, k(5, 5, 3, 7))),
    "scatter": lambda: (x().scatter(1, k(3, 5, 2, 7), x()), x().scatter(0, k(5, 5, 3, 7), 2.0)),
    "scatter in place": lambda: (x().scatter_(2, k(7, 4, 3, 7), x()), x().scatter_(1, k(3, 5, 3, 7), 1.0)),
    "scatter_add": lambda: x().scatter_add(1, k(3, 5, 3, 7), x()),
    "scatter_reduce": lambda: x().scatter_reduce(1, k(3, 5, 3, 7), x(), "amax"),
    "index": lambda: (x()[k(5, 5)], x()[:, k(3, 3, 7)], x()[k(5, 11, 1), :, k(7, 2)], x()[k(5, 2), k(3, 2)]),
    "index of twin": lambda: aten.index.Tensor_hacked_twin(x(), [k(5, 3), k(3, 3)]),
    "_unsafe_index": lambda: aten._unsafe_index(x(), [None, k(3, 3)]),
    "index_put": lambda: (
        x().index_put((k(5, 2), k(3, 2)), r(2, 7)),
        x().index_put((k(5, 5),), r(3, 7)),
        x().index_put((k(5, 5),), r(5, 3, 7), accumulate=True),
        aten.index_put(x(), [None, k(3, 3)], r(5, 3, 7)),
        aten.index_put(x(), [k(5, 2), None, k(7, 2)], r(2, 3)),
        aten.index_put(x(), [None, mask(3, 7)], r(1)),
        x().index_put((mask(5, 3),), torch.tensor(0.0)),
    ),
    "index_put values": lambda: x().__setitem__((slice(None), k(3, 3)), r(7)),
    "_unsafe_index_put": lambda: aten._unsafe_index_put(x(), [None, k(3, 3)], r(5, 3, 7)),
    "_index_put_impl": lambda: aten._index_put_impl(x(), [None, k(3, 3)], r(5, 1, 7)),
    **by_name("index_add index_copy", x, 1, lambda: torch.arange(3), x),
    "index_add rows": lambda: r(5, 3).index_add(0, k(5, 3), r(3, 3)),
    "index_copy rows": lambda: r(5, 3).index_copy_(0, torch.tensor([4, 1, 2]), r(3, 3)),
    "index_reduce": lambda: x().index_reduce(1, k(3, 7), r(5, 7, 7), "amin"),
    "index_fill": lambda: (r(5, 3).index_fill(0, k(5, 3), 2.0), x().index_fill_(1, k(3, 7), torch.tensor(0.5))),
    "slice_scatter": lambda: x().slice_scatter(r(5, 2, 7), 1, 1, 3),
    "select_scatter": lambda: x().select_scatter(a(), 1, 2),
    "isin": lambda: (torch.isin(k(9, 5, 3), k(9, 3)), torch.isin(k(9, 5, 3), k(9, 5, 3)), torch.isin(1, k(9, 3))),
    "masked_scatter": lambda: x().masked_scatter(mask(5, 3, 7), x()),
    "put": lambda: x().put(k(105, 3, 7), r(3, 7)),
    "take": lambda: (x().take(k(105, 3, 7)), x().take(k(105, 5, 3, 7))),
    "searchsorted": lambda: (
        torch.searchsorted(x().sort().values, x()),
        torch.searchsorted(r(7).sort().values, x()),
        torch.searchsorted(a(), a(), sorter=a().argsort()),
    ),
    "bucketize": lambda: torch.bucketize(x(), r(7).sort().values),
}

PRODUCTS = {
    "mm": lambda: (r(5, 3) @ r(3, 7), r(5, 5) @ r(5, 5)),
    "bmm": lambda: (r(2, 5, 3).bmm(r(2, 3, 7)), r(3, 3, 3).bmm(r(3, 3, 3))),
    "addmm": lambda: (torch.addmm(r(7), r(5, 3), r(3, 7)), torch.addmm(r(5, 1), r(5, 3), r(3, 7))),
    "_addmm_activation": lambda: torch._addmm_activation(r(7), r(5, 3), r(3, 7)),
    "baddbmm": lambda: torch.baddbmm(r(5, 7), r(2, 5, 3), r(2, 3, 7)),
    "linear": lambda: (F.linear(x(), r(5, 7), r(5)), F.linear(r(7), r(5, 7)), F.linear(r(7, 5, 5), r(5))),
    "mv": lambda: r(5, 7).mv(r(7)),
    "addmv": lambda: (torch.addmv(r(5), r(5, 5), r(5)), torch.addmv(r(1), r(5, 7), r(7))),
    "addr": lambda: (torch.addr(r(7), r(5), r(7)), torch.addr(r(5, 5), r(5), r(5))),
    "addbmm": lambda: torch.addbmm(r(7), r(2, 5, 3), r(2, 3, 7)),
    "_cdist_forward": lambda: (torch.cdist(r(2, 5, 3), r(2, 7, 3)), torch.cdist(r(5, 3), r(2, 5, 3), p=1)),
    "_euclidean_dist": lambda: aten._euclidean_dist(r(2, 5, 3), r(2, 7, 3)),
    "_trilinear": lambda: F.bilinear(r(2, 5, 3), r(2, 5, 7), r(11, 3, 7)),
}

ALGEBRA = {
    **by_name("linalg_cholesky_ex cholesky cholesky_inverse linalg_inv_ex inverse _linalg_det _linalg_slogdet", square),
    **by_name("linalg_eigh _linalg_eigh linalg_qr linalg_lu linalg_lu_factor_ex linalg_eig _linalg_eigvals", square),
    **by_name("linalg_matrix_exp linalg_ldl_factor_ex geqrf _linalg_svd linalg_pinv", square),
    "cholesky_solve": lambda: torch.cholesky_solve(r(5, 3, 2), square()),
    "_cholesky_solve_helper": lambda: aten._cholesky_solve_helper(r(2, 5, 3, 2), square(), False),
    "linalg_pinv within": lambda: aten.linalg_pinv.atol_rtol_tensor(square(), atol=r(2, 5), rtol=r(5)),
    "linalg_solve_triangular": lambda: torch.linalg.solve_triangular(square(), r(5, 3, 7), upper=True),
    "triangular_solve": lambda: torch.triangular_solve(r(3, 7), square()),
    "_linalg_solve_ex": lambda: (
        torch.linalg.solve(square(), r(2, 5, 3)),
        torch.linalg.solve(square(), r(5, 3, 7)),
        torch.linalg.solve(spd(3, 3, 3), r(3)),
        torch.linalg.solve(spd(3, 3, 3), r(3, 3)),
    ),
    "linalg_lstsq": lambda: torch.linalg.lstsq(n(2, 5, 7, 3), n(2, 5, 7, 2)),
    "linalg_lu_solve": lambda: (torch.linalg.lu_solve(*lu(3, 3, 3, 3), r(3, 3, 2)), torch.lu_unpack(*lu(3, 3, 3))),
    "linalg_ldl_solve": lambda: torch.linalg.ldl_solve(*torch.linalg.ldl_factor(spd(3, 3, 3)), r(3, 3, 2)),
    "linalg_householder_product": lambda: torch.linalg.householder_product(*torch.geqrf(n(2, 5, 7, 3))),
    "ormqr": lambda: torch.ormqr(*torch.geqrf(n(2, 7, 3)), n(2, 7, 2)),
}

POOLS = {
    **by_name("max_pool2d_with_indices avg_pool2d", lambda: image(2), [3, 3]),
    **by_name("max_pool3d_with_indices avg_pool3d", lambda: image(3), [2, 2, 2]),
    **by_name("adaptive_max_pool2d _adaptive_avg_pool2d", lambda: image(2), [2, 2]),
    **by_name("adaptive_max_pool3d _adaptive_avg_pool3d", lambda: image(3), [2, 2, 2]),
    "max_pool2d_with_indices alone": lambda: F.max_pool2d(n(5, 7, 7), 2),
    "max_unpool2d": lambda: F.max_unpool2d(*F.max_pool2d(image(2), 2, return_indices=True), 2, output_size=[11, 7]),
    "max_unpool3d": lambda: F.max_unpool3d(*F.max_pool3d(image(3), 2, return_indices=True), 2, output_size=[11, 7, 13]),
    **{
        f"{mode} {places}": lambda mode=mode, places=places: F.interpolate(image(places), scale_factor=2, mode=mode)
        for mode, dims in {"nearest": [1, 2, 3], "nearest-exact": [1, 2, 3], "bicubic": [2]}.items()
        for places in dims
    },
    "linear upsampling": lambda: [F.interpolate(image(d), scale_factor=2, mode=m) for d, m in SMOOTH.items()],
    "antialiased": lambda: [F.interpolate(image(2), [5, 5], mode=m, antialias=True) for m in ("bilinear", "bicubic")],
    **{
        f"{kind}ion_pad{places}d": lambda mode=mode, places=places: F.pad(image(places), (1, 2) * places, mode)
        for kind, mode in {"reflect": "reflect", "replicat": "replicate"}.items()
        for places in (1, 2, 3)
    },
    "reflection_pad1d moved": lambda: F.pad(image(1), (2, -2), "reflect"),
    "constant_pad_nd": lambda: (F.pad(x(), (1, 1)), F.pad(x(), (0, 0, 1, 0)), F.pad(x(), (-1, 1, 0, 0, 0, 2))),
    "pixel_shuffle": lambda: (F.pixel_shuffle(n(5, 8, 3, 7), 2), F.pixel_unshuffle(n(5, 3, 4, 6), 2)),
    "channel_shuffle": lambda: (F.channel_shuffle(n(5, 4, 3, 7), 2), aten.native_channel_shuffle(n(5, 4, 3, 7), 2)),
    "grid_sampler_2d": lambda: F.grid_sample(image(2), n(5, 2, 13, 2) / 2, align_corners=False),
    "grid_sampler_3d": lambda: F.grid_sample(image(3), n(5, 2, 3, 4, 3) / 2, align_corners=False),
    "affine_grid_generator": lambda: aten.affine_grid_generator(n(5, 2, 3), [5, 2, 3, 7], False),
    "im2col": lambda: (F.unfold(image(2), 3), F.unfold(n(3, 11, 7), 3)),
    "col2im": lambda: (F.fold(n(5, 27, 20), (6, 7), 3), F.fold(n(27, 20), (6, 7), 3)),
}
SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}


def moments():
    return r(3), n(3), n(3), r(3)


LAYERS = {
    "convolution": lambda: (
        F.conv1d(image(1), n(2, 3, 3), n(2)),
        F.conv2d(image(2), n(6, 1, 3, 3), n(6), groups=3),
        F.conv1d(n(3, 11), n(3, 3, 3), n(3)),
        F.conv_transpose1d(n(3, 3, 11), n(3, 3, 3), n(3)),
        F.conv3d(image(3), n(5, 3, 2, 2, 2)),
    ),
    "embedding": lambda: F.embedding(k(7, 5, 3), r(7, 3)),
    **{
        name: lambda name=name: [
            getattr(aten, name)(r(7, 2), k(7, 5), torch.tensor([0, 3]), False, m) for m in range(3)
        ]
        for name in ("_embedding_bag", "_embedding_bag_forward_only")
    },
    "embedding_renorm": lambda: aten.embedding_renorm(r(7, 3), k(7, 5), 0.5, 2),
    "native_layer_norm": lambda: (F.layer_norm(x(), (7,), r(7), n(7)), F.layer_norm(x(), (3, 7))),
    "_fused_rms_norm": lambda: aten._fused_rms_norm(x(), [7], r(7), 1e-6),
    "native_group_norm": lambda: F.group_norm(n(5, 4, 7), 2, n(4), n(4)),
    "native_batch_norm": lambda: [
        (aten.native_batch_norm(v, *moments(), training, 0.1, 1e-5), F.instance_norm(image(2)))
        for training in (True, False)
        for v in (image(1), n(5, 3), image(2))
    ],
    "_native_batch_norm_legit": lambda: [
        aten._native_batch_norm_legit(image(1), *moments(), True, 0.1, 1e-5),
        aten._native_batch_norm_legit(image(1), *moments(), False, 0.1, 1e-5),
        aten._native_batch_norm_legit.no_stats(image(1), r(3), n(3), True, 0.1, 1e-5),
    ],
    "_native_batch_norm_legit_no_training": lambda: aten._native_batch_norm_legit_no_training(
        image(2), *moments(), 0.1, 1e-5
    ),
    **{
        name: lambda name=name: getattr(aten, name)(image(2), *moments(), 0.1, 1e-5)
        for name in ("_batch_norm_with_update", "_batch_norm_no_update")
    },
    "nll_loss_forward": lambda: [
        (F.nll_loss(n(5, 5), k(5, 5), r(5), reduction=how), F.nll_loss(n(5), k(5), reduction=how))
        for how in ("none", "sum")
    ],
    "nll_loss2d_forward": lambda: F.nll_loss(n(5, 3, 7, 2), k(3, 5, 7, 2), r(3), reduction="none"),
    "multi_margin_loss": lambda: F.multi_margin_loss(n(5, 5), k(5, 5), weight=r(5), reduction="none"),
    "multilabel_margin_loss_forward": lambda: [
        F.multilabel_margin_loss(n(*shape), k(3, *shape), reduction="none") for shape in ((5, 3), (5,))
    ],
    "losses": lambda: [
        loss(x(), r(3, 1).expand(5, 3, 7), reduction=how)
        for loss in (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss)
        for how in ("none", "mean")
    ],
    "binary_cross_entropy": lambda: (
        F.binary_cross_entropy(a() / 2, a() / 2, r(7), reduction="none"),
        F.binary_cross_entropy_with_logits(a(), a(), r(7), pos_weight=r(7), reduction="none"),
    ),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: [
        F.scaled_dot_product_attention(n(2, 3, 5, 7), n(2, 3, keys, 7), n(2, 3, keys, 7), attn_mask=m)
        for keys in (5, 11)
        for m in (None, n(5, keys), n(2, 1, 5, keys))
    ],
    "_native_multi_head_attention": lambda: aten._native_multi_head_attention(
        *[n(5, 3, 8)] * 3, 8, 2, n(24, 8), n(24), n(8, 8), n(8)
    ),
    "_transformer_encoder_layer_fwd": lambda: aten._transformer_encoder_layer_fwd(
        n(5, 3, 8),
        8,
        2,
        n(24, 8),
        n(24),
        n(8, 8),
        n(8),
        False,
        False,
        1e-5,
        n(8),
        n(8),
        n(8),
        n(8),
        n(7, 8),
        n(7),
        n(8, 7),
        n(8),
    ),
    "mkldnn_rnn_layer": lambda: torch.nn.LSTM(7, 2).float()(r(5, 3, 7).float()),
}

CALLS = {**COPIES, **RANDOM, **ARITHMETIC, **REDUCTIONS, **INDICES, **PRODUCTS, **ALGEBRA, **POOLS, **LAYERS}
