"""Functions of a number by their continuity: those that jump in it, or whose derivative is not their own, and those that do neither."""

import pyro.distributions as dist
import torch
import torch.nn.functional as F

EDGES = torch.tensor([0.2, 0.45, 0.9], dtype=torch.float64)


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.where(x > 0.4, 2.0, 0.0)

    @staticmethod
    def backward(ctx, g):
        return g


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


class OfALaw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return dist.Normal(x, 1.0).log_prob(torch.tensor(0.3))

    @staticmethod
    def backward(ctx, g):
        return 0 * g


class Doubling(torch.autograd.Function):
    """A right one, which nobody can tell from a wrong one."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def three(z):
    return torch.stack([z, 0.7 - z, 0.2 + 0.3 * z])


def slope(function, x):
    """Return the derivative of a function, itself with a derivative."""
    with torch.enable_grad():
        x = x if x.requires_grad else x + torch.zeros((), requires_grad=True)
        return torch.autograd.grad(function(x), x, create_graph=True)[0]


JUMPING = {
    "copysign": lambda z: torch.copysign(torch.tensor(2.0), z - 0.4),
    "heaviside": lambda z: torch.heaviside(z - 0.4, torch.tensor(0.0)),
    "fmod": lambda z: torch.fmod(z, 0.4),
    "remainder": lambda z: z % 0.4,
    "frac": lambda z: (3 * z).frac(),
    "floor_divide": lambda z: z // 0.4,
    "div, rounded": lambda z: torch.div(z, 0.4, rounding_mode="floor"),
    "round": lambda z: torch.round(3 * z),
    "round_": lambda z: (3 * z).round_(),
    "round, decimals": lambda z: torch.round(3 * z, decimals=1),
    "trunc": lambda z: torch.trunc(3 * z),
    "fix": lambda z: torch.fix(3 * z),
    "ceil": lambda z: torch.ceil(3 * z),
    "floor": lambda z: torch.floor(3 * z),
    "sign": lambda z: torch.sign(z - 0.4),
    "sgn": lambda z: torch.sgn(z - 0.4),
    "atan2": lambda z: torch.atan2(z - 0.5, torch.tensor(-1.0)),
    "angle": lambda z: torch.angle(z - 0.5),
    "nextafter": lambda z: torch.nextafter(z, torch.tensor(9.0)),
    "argsort": lambda z: (torch.argsort(three(z)) * EDGES).sum(),
    "sort's places": lambda z: (torch.sort(three(z))[1] * EDGES).sum(),
    "topk's places": lambda z: torch.topk(three(z), 1)[1][0] * 1.0,
    "max's place": lambda z: torch.max(three(z), 0)[1] * 1.0,
    "picked by max's place": lambda z: EDGES[torch.max(three(z), 0)[1]],
    "median's place": lambda z: torch.median(three(z), 0)[1] * 1.0,
    "mode": lambda z: torch.mode(three(z))[0],
    "argmax": lambda z: torch.argmax(three(z)) * 1.0,
    "bucketize": lambda z: torch.bucketize(z, EDGES) * 1.0,
    "searchsorted": lambda z: torch.searchsorted(EDGES, z) * 1.0,
    "histc": lambda z: (torch.histc(three(z), 3, -1.0, 1.5) * EDGES).sum(),
    "bincount": lambda z: torch.bincount((3 * three(z)).abs().long(), minlength=4)[0] * 1.0,
    "bits": lambda z: z.view(torch.int64) * 1e-18,
    "bits and back": lambda z: (z.view(torch.int64) & -(2**50)).view(torch.float64),
    "parts of bits": lambda z: z[None].view(torch.bfloat16)[0].float(),
    "signbit": lambda z: torch.where(torch.signbit(z - 0.4), 2.0, 0.0),
    "frexp": lambda z: torch.frexp(z + 0.3)[0],
    "isclose": lambda z: torch.isclose(z, torch.tensor(0.4), atol=0.1) * 1.0,
    "hardshrink": lambda z: F.hardshrink(z, 0.4),
    "threshold": lambda z: F.threshold(z, 0.4, 2.0),
    "bernoulli": lambda z: torch.bernoulli(0.1 + 0.8 * z),
    "float8": lambda z: z.to(torch.float8_e4m3fn).float(),
    "a sign of a determinant": lambda z: torch.linalg.slogdet(torch.diag(torch.stack([z - 0.4, EDGES[0]])))[0],
    "an eigenvector": lambda z: torch.linalg.eigh(torch.tensor([[0.0, 1.0], [1.0, 0.0]]) * (z - 0.4))[1][0, 0],
    "qr": lambda z: torch.linalg.qr(torch.stack([z - 0.4, EDGES[0]])[:, None])[1][0, 0],
    "a complex root": lambda z: torch.sqrt(torch.complex(-torch.ones(()), z - 0.5)).imag,
    "a slope of relu": lambda z: slope(torch.relu, z - 0.4),
    "a slope of abs": lambda z: slope(torch.abs, z - 0.4),
    "a slope of clamp": lambda z: slope(lambda x: x.clamp(0.2, 0.4), z),
    "a slope of maximum": lambda z: slope(lambda x: torch.maximum(x, EDGES[1]), z),
    "mapped": lambda z: torch.vmap(torch.frac)(3 * three(z)).sum(),
    "a step with a derivative of its own": Step.apply,
    "a gradient that is reversed": lambda z: Reversed.apply(2 * z),
    "a gradient that is reversed, of its operand": lambda z: Same.apply(2 * z),
    "a density with another derivative": OfALaw.apply,
    "a right derivative of its own": Doubling.apply,
}
"""Of each there is a cost whose slope along a relaxed value is wrong, or may be."""

CONTINUOUS = {
    "polynomial": lambda z: 2 * z**3 - z**2 + 1 / (1 + z) - z**0.5,
    "elementary": lambda z: z.neg().exp() + z.log1p() + (3 * z).sin() + z.tanh() + z.sqrt() + z.expm1() + z.atan(),
    "special": lambda z: (
        torch.lgamma(1 + z)
        + torch.digamma(1 + z)
        + torch.erf(z)
        + torch.erfinv(0.5 * z)
        + torch.special.ndtri(0.2 + 0.5 * z)
        + torch.special.log_ndtr(-3 * z)
        + torch.logit(0.1 + 0.8 * z)
        + torch.xlogy(z, z + 1)
        + torch.special.i0e(z)
        + torch.sinc(z - 0.4)
        + torch.special.entr(0.1 + z)
        + torch.polygamma(1, 1 + z)
    ),
    "clamp": lambda z: (
        (2 * z).clamp(0.3, 1.2) + torch.maximum(z, EDGES[1]) + z.clamp(max=0.4) + torch.fmax(z, EDGES[0])
    ),
    "abs": lambda z: (z - 0.4).abs() + torch.hypot(z, EDGES[0]),
    **{
        name: lambda z, name=name: getattr(F, name)(3 * z - 1.3)
        for name in "relu relu6 leaky_relu elu selu celu gelu silu mish softplus logsigmoid hardtanh hardsigmoid hardswish "
        "softshrink softsign tanhshrink sigmoid".split()
    },
    **{name: lambda z, name=name: (getattr(F, name)(three(z), 0) * EDGES).sum() for name in ("softmax", "log_softmax")},
    "logsumexp": lambda z: torch.logsumexp(three(z), 0) + torch.logaddexp(z, EDGES[1]),
    "largest": lambda z: (
        three(z).max() + three(z).amin() + three(z).sort()[0][1] + three(z).topk(2)[0][1] + three(z).max(0)[0]
    ),
    "order statistics": lambda z: three(z).median() + three(z).kthvalue(1)[0],
    "moments": lambda z: three(z).mean() + three(z).var() + three(z).std() + three(z).norm(),
    "sums": lambda z: (three(z).cumsum(0) * (1 + three(z)).cumprod(0) * three(z).cummax(0)[0]).sum(),
    "matrices": lambda z: (
        torch.linalg.solve(torch.eye(3) + torch.outer(three(z), three(z)), three(z)).sum()
        + torch.linalg.cholesky(torch.eye(2) * (1 + z))[0, 0]
        + torch.linalg.slogdet(torch.eye(3) + torch.outer(three(z), EDGES))[1]
        + torch.det(torch.eye(3) + torch.outer(three(z), EDGES))
        + torch.inverse(torch.eye(2) * (1 + z))[1, 1]
        + torch.linalg.eigvalsh(torch.diag(three(z)))[0]
        + torch.linalg.svdvals(torch.diag(three(z)))[0]
    ),
    "shapes": lambda z: (
        F.pad(three(z).flip(0), (1, 1))[torch.tensor([1, 2])].sum()
        + torch.zeros(3).index_fill(0, torch.tensor([1]), 1.0).mul(z).scatter_add(0, torch.tensor([2]), z[None]).sum()
    ),
    "convolution": lambda z: (
        F.conv1d(three(z)[None, None], EDGES[None, None]).sum() + torch.fft.fft(three(z)).abs().sum()
    ),
    "layers": lambda z: F.layer_norm(three(z), (3,))[0] + F.linear(three(z), EDGES[None])[0] + F.mse_loss(z, EDGES[0]),
    "half precision": lambda z: z.bfloat16().float(),
    "a choice by another value": lambda z: torch.where(EDGES > 0.3, three(z), 0.0).sum(),
    "mapped": lambda z: torch.vmap(torch.relu)(three(z)).sum(),
    "a slope of a smooth function": lambda z: slope(lambda x: F.softplus(x) + x.sin() + x**3, z),
}
"""Continuous, and with their own derivative: slopes may be taken along them."""


def at(x):
    return torch.tensor(float(x))


LAWS = {
    "Normal": lambda z: dist.Normal(z, 0.5 + z).log_prob(at(0.3)),
    "LogNormal": lambda z: dist.LogNormal(z, 0.5 + z).log_prob(at(0.3)),
    "HalfNormal": lambda z: dist.HalfNormal(0.5 + z).log_prob(at(0.3)),
    "HalfCauchy": lambda z: dist.HalfCauchy(0.5 + z).log_prob(at(0.3)),
    "Laplace": lambda z: dist.Laplace(z, 0.5 + z).log_prob(at(0.3)),
    "Gumbel": lambda z: dist.Gumbel(z, 0.5 + z).log_prob(at(0.3)),
    "StudentT": lambda z: dist.StudentT(1 + z, z, 0.5 + z).log_prob(at(0.3)),
    "Gamma": lambda z: dist.Gamma(0.5 + z, 0.5 + z).log_prob(at(0.3)),
    "InverseGamma": lambda z: dist.InverseGamma(0.5 + z, 0.5 + z).log_prob(at(0.3)),
    "Exponential": lambda z: dist.Exponential(0.5 + z).log_prob(at(0.3)),
    "Weibull": lambda z: dist.Weibull(0.5 + z, 0.5 + z).log_prob(at(0.3)),
    "Beta": lambda z: dist.Beta(0.5 + z, 1.5 - z).log_prob(at(0.3)),
    "Dirichlet": lambda z: dist.Dirichlet(1.0 + three(z)).log_prob(torch.tensor([0.2, 0.3, 0.5])),
    "MultivariateNormal": lambda z: dist.MultivariateNormal(three(z), torch.eye(3) * (0.5 + z)).log_prob(EDGES),
    "LowRank": lambda z: dist.LowRankMultivariateNormal(three(z), three(z)[:, None], 0.5 + torch.ones(3) * z).log_prob(
        EDGES
    ),
    "Bernoulli": lambda z: dist.Bernoulli(0.1 + 0.8 * z).log_prob(at(1)) + dist.Bernoulli(logits=z).log_prob(at(0)),
    "Binomial": lambda z: dist.Binomial(5, 0.1 + 0.8 * z).log_prob(at(2)) + dist.Binomial(5, logits=z).log_prob(at(2)),
    "Poisson": lambda z: dist.Poisson(0.5 + z).log_prob(at(2)),
    "NegativeBinomial": lambda z: dist.NegativeBinomial(2.0, 0.1 + 0.8 * z).log_prob(at(2)),
    "Geometric": lambda z: dist.Geometric(0.1 + 0.8 * z).log_prob(at(2)),
    "ZeroInflated": lambda z: dist.ZeroInflatedPoisson(0.5 + z, gate=0.1 + 0.8 * z).log_prob(at(0)),
    "Categorical": lambda z: dist.Categorical(logits=three(z)).log_prob(at(2)),
    "Mixture": lambda z: dist.MixtureSameFamily(dist.Categorical(logits=three(z)), dist.Normal(EDGES, 1.0)).log_prob(z),
    "LKJCholesky": lambda z: dist.LKJCholesky(2, 0.5 + z).log_prob(torch.eye(2)),
    "OrderedLogistic": lambda z: dist.OrderedLogistic(z, EDGES).log_prob(at(1)),
    "a cdf": lambda z: dist.Normal(z, 1.0).cdf(at(0.3)),
    "a draw": lambda z: (
        dist.Normal(z, 1.0).rsample() + dist.Gamma(1 + z, 1.0).rsample() + dist.Laplace(z, 1.0).rsample()
    ),
}
"""Densities and draws of Pyro's laws, of parameters that are continuous in the number."""

OBSERVED = {
    "VonMises": lambda z: (dist.VonMises(z, 0.5 + z), at(0.3)),
    "Multinomial": lambda z: (dist.Multinomial(3, logits=three(z)), torch.tensor([1.0, 0.0, 2.0])),
    "Categorical": lambda z: (dist.Categorical(probs=three(z).softmax(0)), at(2)),
    "Uniform": lambda z: (dist.Uniform(-z, 1 + z), at(0.3)),
    "Truncated": lambda z: (dist.HalfNormal(0.5 + z), at(0.3)),
    "ZeroInflated": lambda z: (dist.ZeroInflatedPoisson(0.5 + z, gate=0.1 + 0.8 * z), at(0)),
    "BetaBinomial": lambda z: (dist.BetaBinomial(0.5 + z, at(1), 5), at(2)),
}
"""Laws whose densities compare or look up, where Pyro asks for them: at a site."""
