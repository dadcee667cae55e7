"""Functions of a number by their continuity: those that jump in it, or whose derivative is not their own, and those that do neither."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax

EDGES = jnp.array([0.2, 0.45, 0.9])


@jax.custom_jvp
def own_step(x):
    return jnp.where(x > 0.4, 2.0, 0.0)


own_step.defjvp(lambda points, moves: (own_step(*points), 0.0 * moves[0]))
own_sine = jax.custom_jvp(jnp.sin)
own_sine.defjvps(lambda move, answer, x: 0.0 * move)


@jax.custom_vjp
def own_straight_through(x):
    return jnp.where(x > 0.4, 2.0, 0.0)


own_straight_through.defvjp(lambda x: (own_straight_through(x), None), lambda kept, move: (move,))
reversed_gradient = jax.custom_vjp(jnp.tanh)
reversed_gradient.defvjp(lambda x: (jnp.tanh(x), None), jax.jit(lambda kept, move: (-move,)))


def three(z):
    return jnp.stack([z, 0.7 - z, 0.2 + 0.3 * z])


JUMPING = {
    "searchsorted": lambda z: jnp.searchsorted(EDGES, z) * 1.0,
    "digitize": lambda z: jnp.digitize(z, EDGES) * 1.0,
    "copysign": lambda z: jnp.copysign(2.0, z - 0.4),
    "heaviside": lambda z: jnp.heaviside(z - 0.4, 0.0),
    "%": lambda z: z % 0.4,
    "fmod": lambda z: jnp.fmod(z, 0.4),
    "lax.rem": lambda z: lax.rem(z, jnp.full_like(z, 0.4)),
    "//": lambda z: z // 0.4,
    "modf": lambda z: jnp.modf(3 * z)[0],
    "sort with a payload": lambda z: lax.sort((three(z), jnp.arange(3.0)), num_keys=1)[1][0],
    "argsort": lambda z: (jnp.argsort(three(z)) * EDGES).sum(),
    "top_k's places": lambda z: lax.top_k(three(z), 1)[1][0] * 1.0,
    "argpartition": lambda z: (jnp.argpartition(three(z), 1) * EDGES).sum(),
    "lexsort": lambda z: (jnp.lexsort((three(z),)) * EDGES).sum(),
    "signbit": lambda z: jnp.where(jnp.signbit(z - 0.4), 2.0, 0.0),
    "frexp": lambda z: jnp.frexp(z + 0.3)[1] * 1.0,
    "unique_inverse": lambda z: (jnp.unique_inverse(three(z), size=3).inverse_indices * EDGES).sum(),
    "bits": lambda z: lax.bitcast_convert_type(z, jnp.int32) * 1e-9,
    "bits and back": lambda z: lax.bitcast_convert_type(lax.bitcast_convert_type(z, jnp.int32) & -(2**20), jnp.float32),
    "unwrap": lambda z: jnp.unwrap(9 * three(z)).sum(),
    "arctan2": lambda z: jnp.arctan2(z - 0.5, -1.0),
    "a complex root": lambda z: jnp.real(jnp.sqrt(-1.0 + 1j * (z - 0.5)) * 1j),
    "trunc": lambda z: jnp.trunc(3 * z),
    "rint": lambda z: jnp.rint(3 * z),
    "sign": lambda z: jnp.sign(z - 0.4),
    "isclose": lambda z: jnp.isclose(z, 0.4, atol=0.1) * 1.0,
    "any": lambda z: jnp.any(jax.nn.relu(z - 0.4)) * 1.0,
    "nextafter": lambda z: jnp.nextafter(z, 9.0),
    "few bits": lambda z: lax.reduce_precision(z, 8, 1),
    "float8": lambda z: z.astype(jnp.float8_e4m3fn).astype(jnp.float32),
    "histogram": lambda z: (jnp.histogram(three(z), bins=3, range=(-1.0, 1.5))[0] * EDGES).sum(),
    "rankdata": lambda z: (jax.scipy.stats.rankdata(three(z)) * EDGES).sum(),
    "one_hot of argmax": lambda z: (jax.nn.one_hot(jnp.argmax(three(z)), 3) * EDGES).sum(),
    "an eigenvector": lambda z: jnp.linalg.eigh(jnp.array([[0.0, 1.0], [1.0, 0.0]]) * (z - 0.4))[1][0, 0],
    "qr": lambda z: jnp.linalg.qr(jnp.stack([z - 0.4, 0.3])[:, None])[1][0, 0],
    "a sign of a determinant": lambda z: jnp.linalg.slogdet(jnp.diag(jnp.stack([z - 0.4, 1.0])))[0],
    "matrix_rank": lambda z: jnp.linalg.matrix_rank(jnp.diag(three(z)), rtol=0.5) * 1.0,
    "an end of interp": lambda z: jnp.interp(z, EDGES, EDGES, left=9.0),
    "an order of a quantile": lambda z: jnp.quantile(EDGES, z, method="nearest"),
    "a norm that counts": lambda z: jnp.linalg.norm(jax.nn.relu(three(z) - 0.4), ord=0),
    "a slope of relu": lambda z: jax.grad(jax.nn.relu)(z - 0.4),
    "a slope of clip": lambda z: jax.grad(lambda x: jnp.clip(x, 0.2, 0.4))(z),
    "a slope of maximum": lambda z: jax.grad(lambda x: jnp.maximum(x, 0.4))(z),
    "a slope of abs": lambda z: jax.grad(jnp.abs)(z - 0.4),
    "a slope of leaky_relu, compiled": lambda z: jax.grad(jax.jit(lambda x: jax.nn.leaky_relu(x - 0.4)))(z),
    "a slope of a maximum": lambda z: jax.grad(lambda x: jnp.max(three(x)))(z),
    "compiled": lambda z: jax.jit(jnp.heaviside)(z - 0.4, 0.0),
    "mapped": lambda z: jax.vmap(jnp.floor)(3 * three(z)).sum(),
    "in a loop": lambda z: lax.scan(lambda c, x: (c + jnp.copysign(x, z - 0.4), None), 0.0, EDGES)[0],
    "stopped by a mapping": lambda z: jax.tree.map(lax.stop_gradient, z),
    "stopped, compiled": lambda z: jax.jit(lax.stop_gradient)(z),
    "stopped, mapped": lambda z: jax.vmap(lax.stop_gradient)(three(z)).sum(),
    "a step with a derivative of its own": own_step,
    "a sine with another derivative": own_sine,
    "straight through": own_straight_through,
    "a gradient that is reversed": reversed_gradient,
}
"""Of each there is a cost whose slope along a relaxed value is wrong, or may be."""

CONTINUOUS = {
    "polynomial": lambda z: 2 * z**3 - z**2 + 1 / (1 + z) - z**0.5,
    "elementary": lambda z: jnp.exp(-z) + jnp.log1p(z) + jnp.sin(3 * z) + jnp.tanh(z) + jnp.sqrt(z) + jnp.expm1(z),
    "special": lambda z: (
        jax.scipy.special.gammaln(1 + z)
        + jax.scipy.special.digamma(1 + z)
        + jax.scipy.special.erf(z)
        + jax.scipy.special.erfinv(0.5 * z)
        + jax.scipy.special.ndtri(0.2 + 0.5 * z)
        + jax.scipy.special.log_ndtr(-3 * z)
        + jax.scipy.special.logit(0.1 + 0.8 * z)
        + jax.scipy.special.xlogy(z, z + 1)
        + jax.scipy.special.betaln(1 + z, 2.0)
        + jax.scipy.special.i0e(z)
        + jnp.sinc(z - 0.4)
    ),
    "incomplete": lambda z: jax.scipy.special.gammainc(1 + z, 0.7) + jax.scipy.special.betainc(1.0, 2.0, 0.1 + 0.8 * z),
    "clip": lambda z: jnp.clip(2 * z, 0.3, 1.2) + jnp.maximum(z, 0.4) + jnp.minimum(z, 0.4) + jnp.fmax(z, 0.2),
    "abs": lambda z: jnp.abs(z - 0.4) + jnp.fabs(z - 0.3) + jnp.hypot(z, 0.2),
    **{
        name: lambda z, name=name: getattr(jax.nn, name)(3 * z - 1.3)
        for name in "relu relu6 leaky_relu elu selu celu gelu silu mish softplus log_sigmoid hard_tanh hard_sigmoid hard_silu "
        "sparse_plus sparse_sigmoid squareplus soft_sign sigmoid".split()
    },
    **{
        name: lambda z, name=name: (getattr(jax.nn, name)(three(z)) * EDGES).sum()
        for name in "softmax log_softmax logsumexp standardize".split()
    },
    "logaddexp": lambda z: jnp.logaddexp(z, 0.4) + jnp.logaddexp2(z, 0.4) + jnp.logaddexp(three(z)[0], three(z)[1]),
    "largest": lambda z: jnp.max(three(z)) + jnp.min(three(z)) + jnp.sort(three(z))[1] + lax.top_k(three(z), 2)[0][1],
    "order statistics": lambda z: jnp.median(three(z)) + jnp.quantile(three(z), 0.3) + jnp.percentile(three(z), 30.0),
    "moments": lambda z: (
        jnp.mean(three(z))
        + jnp.var(three(z))
        + jnp.std(three(z))
        + jnp.linalg.norm(three(z))
        + jnp.linalg.norm(three(z), 1)
    ),
    "sums": lambda z: (jnp.cumsum(three(z)) * jnp.cumprod(1 + three(z)) * lax.cummax(three(z))).sum(),
    "matrices": lambda z: (
        jnp.linalg.solve(jnp.eye(3) + jnp.outer(three(z), three(z)), three(z)).sum()
        + jnp.linalg.cholesky(jnp.eye(2) * (1 + z))[0, 0]
        + jnp.linalg.slogdet(jnp.eye(3) + jnp.outer(three(z), EDGES))[1]
        + jnp.linalg.det(jnp.eye(3) + jnp.outer(three(z), EDGES))
        + jnp.linalg.inv(jnp.eye(2) * (1 + z))[1, 1]
        + jnp.linalg.eigvalsh(jnp.diag(three(z)))[0]
    ),
    "shapes": lambda z: (
        jnp.pad(three(z)[::-1], 1)[jnp.array([1, 2])].sum() + jnp.zeros(3).at[1].set(z).at[2].add(z).sum()
    ),
    "convolution": lambda z: jnp.convolve(three(z), EDGES).sum() + jnp.abs(jnp.fft.fft(three(z))).sum(),
    "interpolation": lambda z: jnp.interp(z, EDGES, jnp.array([0.0, 1.0, -1.0])),
    "nan_to_num": lambda z: jnp.nan_to_num(z * 2),
    "half precision": lambda z: z.astype(jnp.bfloat16).astype(jnp.float32),
    "a choice by another value": lambda z: jnp.where(EDGES > 0.3, three(z), 0.0).sum(),
    "compiled and repeated": lambda z: lax.fori_loop(0, 3, lambda i, x: jax.jit(jax.nn.relu)(x - 0.1 * z), z),
    "checkpointed": lambda z: jax.checkpoint(lambda x: jnp.sin(jax.nn.softplus(x)))(z),
    "a slope of a smooth function": lambda z: jax.grad(
        lambda x: jax.nn.logsumexp(three(x)) + jax.nn.softplus(x) + jnp.sin(x) + jax.nn.log_sigmoid(x)
    )(z),
}
"""Continuous, and with their own derivative: slopes may be taken along them."""

LAWS = {
    "Normal": lambda z: dist.Normal(z, 0.5 + z).log_prob(0.3),
    "LogNormal": lambda z: dist.LogNormal(z, 0.5 + z).log_prob(0.3),
    "HalfNormal": lambda z: dist.HalfNormal(0.5 + z).log_prob(0.3),
    "HalfCauchy": lambda z: dist.HalfCauchy(0.5 + z).log_prob(0.3),
    "Cauchy": lambda z: dist.Cauchy(z, 0.5 + z).log_prob(0.3),
    "Laplace": lambda z: dist.Laplace(z, 0.5 + z).log_prob(0.3),
    "Logistic": lambda z: dist.Logistic(z, 0.5 + z).log_prob(0.3),
    "Gumbel": lambda z: dist.Gumbel(z, 0.5 + z).log_prob(0.3),
    "StudentT": lambda z: dist.StudentT(1 + z, z, 0.5 + z).log_prob(0.3),
    "Gamma": lambda z: dist.Gamma(0.5 + z, 0.5 + z).log_prob(0.3),
    "InverseGamma": lambda z: dist.InverseGamma(0.5 + z, 0.5 + z).log_prob(0.3),
    "Exponential": lambda z: dist.Exponential(0.5 + z).log_prob(0.3),
    "Weibull": lambda z: dist.Weibull(0.5 + z, 0.5 + z).log_prob(0.3),
    "Beta": lambda z: dist.Beta(0.5 + z, 1.5 - z).log_prob(0.3),
    "Dirichlet": lambda z: dist.Dirichlet(1.0 + three(z)).log_prob(jnp.array([0.2, 0.3, 0.5])),
    "MultivariateNormal": lambda z: dist.MultivariateNormal(three(z), jnp.eye(3) * (0.5 + z)).log_prob(EDGES),
    "LowRank": lambda z: dist.LowRankMultivariateNormal(three(z), three(z)[:, None], 0.5 + jnp.ones(3) * z).log_prob(
        EDGES
    ),
    "VonMises": lambda z: dist.VonMises(z, 0.5 + z).log_prob(0.3),
    "Truncated": lambda z: dist.TruncatedNormal(z, 0.5 + z, low=0.0, high=2.0).log_prob(0.3),
    "Bernoulli": lambda z: dist.Bernoulli(probs=0.1 + 0.8 * z).log_prob(1) + dist.Bernoulli(logits=z).log_prob(0),
    "Binomial": lambda z: dist.Binomial(5, probs=0.1 + 0.8 * z).log_prob(2) + dist.Binomial(5, logits=z).log_prob(2),
    "Poisson": lambda z: dist.Poisson(0.5 + z).log_prob(2),
    "NegativeBinomial": lambda z: (
        dist.NegativeBinomial2(0.5 + z, 1.5).log_prob(2) + dist.NegativeBinomialLogits(2.0, z).log_prob(2)
    ),
    "Geometric": lambda z: dist.GeometricProbs(0.1 + 0.8 * z).log_prob(2),
    "ZeroInflated": lambda z: dist.ZeroInflatedPoisson(0.1 + 0.8 * z, 0.5 + z).log_prob(0),
    "BetaBinomial": lambda z: dist.BetaBinomial(0.5 + z, 1.0, 5).log_prob(2),
    "Categorical": lambda z: (
        dist.Categorical(logits=three(z)).log_prob(2) + dist.Categorical(probs=jax.nn.softmax(three(z))).log_prob(1)
    ),
    "Multinomial": lambda z: dist.Multinomial(3, logits=three(z)).log_prob(jnp.array([1, 0, 2])),
    "Mixture": lambda z: dist.MixtureSameFamily(dist.Categorical(logits=three(z)), dist.Normal(EDGES, 1.0)).log_prob(z),
    "LKJCholesky": lambda z: dist.LKJCholesky(2, 0.5 + z).log_prob(jnp.eye(2)),
    "OrderedLogistic": lambda z: dist.OrderedLogistic(z, EDGES).log_prob(1),
    "a cdf": lambda z: dist.Normal(z, 1.0).cdf(0.3) + dist.Gamma(1 + z, 1.0).cdf(0.3) + dist.Beta(1.0, 1 + z).cdf(0.3),
    "StudentT's value": lambda z: dist.StudentT(3.0, 0.0, 1.0).log_prob(z),
}
"""Densities of NumPyro's laws, of parameters that are continuous in the number."""
