"""Values and gradients of the losses that TextBrewer has not, against their formulas in torch."""

import functools
import inspect

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxbrewer import losses

pytestmark = pytest.mark.torch

LABELS = np.array([2, 0, -100, 4, 1, 1])


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def distributions(S, T, temperature):
    return F.softmax(T / temperature, -1), F.softmax(S / temperature, -1)


def of_distributions(function):
    """A formula of p and q, as one of logits and a temperature."""

    def formula(S, T, temperature, **options):
        return function(*distributions(S, T, temperature), **options)

    return formula


def jsd(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return (beta * kl(p, m) + (1 - beta) * kl(q, m)).mean()


def dkd(S, T, temperature, alpha=1.0, beta=8.0, factor=True):
    keep = torch.tensor(LABELS >= 0)
    y = torch.tensor(LABELS)[keep]
    p, q = distributions(S[keep], T[keep], temperature)
    true_p, true_q = (x.gather(-1, y[:, None])[:, 0] for x in (p, q))
    binary = [torch.stack([x, 1 - x], -1) for x in (true_p, true_q)]
    others = ~F.one_hot(y, S.shape[-1]).bool()
    rest = [x[others].reshape(len(y), -1) for x in (p, q)]
    rest = [x / x.sum(-1, keepdim=True) for x in rest]
    each = alpha * kl(*binary) + beta * kl(*rest)
    return each.mean() * (temperature**2 if factor else 1)


def correlation(x, y, axis):
    x, y = (v - v.mean(axis, keepdim=True) for v in (x, y))
    return (x * y).sum(axis) / (x.norm(dim=axis) * y.norm(dim=axis))


def dist(S, T, temperature, beta=1.0, gamma=1.0):
    p, q = distributions(S, T, temperature)
    between = 1 - correlation(q, p, -1).mean()
    within = 1 - correlation(q, p, 0).mean()
    return temperature**2 * (beta * between + gamma * within)


def standard(z):
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7)


LOGITS = [
    ("kd_kl_loss", {}, of_distributions(lambda p, q: kl(p, q).mean())),
    ("kd_reverse_kl_loss", {}, of_distributions(lambda p, q: kl(q, p).mean())),
    ("kd_jsd_loss", {}, of_distributions(jsd)),
    ("kd_jsd_loss", {"beta": 0.1}, of_distributions(functools.partial(jsd, beta=0.1))),
    ("kd_jsd_loss", {"beta": 0}, of_distributions(lambda p, q: kl(p, q).mean())),
    ("kd_jsd_loss", {"beta": 1}, of_distributions(lambda p, q: kl(q, p).mean())),
    ("kd_skew_kl_loss", {}, of_distributions(lambda p, q: kl(p, 0.1 * p + 0.9 * q).mean())),
    ("kd_skew_kl_loss", {"alpha": 0}, of_distributions(lambda p, q: kl(p, q).mean())),
    (
        "kd_skew_reverse_kl_loss",
        {"alpha": 0.3},
        of_distributions(lambda p, q: kl(q, 0.7 * p + 0.3 * q).mean()),
    ),
    ("kd_tvd_loss", {}, of_distributions(lambda p, q: (p - q).abs().sum(-1).mean() / 2)),
    ("kd_dkd_loss", {"labels": LABELS}, dkd),
    (
        "kd_dkd_loss",
        {"labels": LABELS, "alpha": 0.5, "beta": 2, "scale_by_t2": False},
        functools.partial(dkd, alpha=0.5, beta=2, factor=False),
    ),
    ("kd_dist_loss", {}, dist),
    ("kd_dist_loss", {"beta": 2, "gamma": 0.5}, functools.partial(dist, beta=2, gamma=0.5)),
    (
        "kd_kl_loss",
        {"standardize": True, "scale_by_t2": True},
        lambda S, T, t: t**2 * kl(*distributions(standard(S), standard(T), t)).mean(),
    ),
    (
        "kd_mse_loss",
        {"standardize": True},
        lambda S, T, t: F.mse_loss(standard(S) / t, standard(T) / t),
    ),
    ("kd_mse_loss", {"scale_by_t2": True}, lambda S, T, t: F.mse_loss(S, T)),
]


def huber(x, y):
    return F.smooth_l1_loss(x, y)


def distances(x):
    difference = x[:, None] - x[None]
    square = difference.square().sum(-1)
    distance = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    return distance / distance[distance > 0].mean()


def angles(x):
    units = F.normalize(x[None] - x[:, None], dim=-1)
    return torch.einsum("ijd,ikd->ijk", units, units)


def similarity(S, T):
    grams = [F.normalize(x.flatten(1) @ x.flatten(1).T, dim=-1) for x in (S, T)]
    return (grams[0] - grams[1]).square().sum() / len(S) ** 2


def cka(S, T):
    x, y = (v.flatten(0, -2) - v.flatten(0, -2).mean(0) for v in (S, T))
    return 1 - (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def infonce(S, T, temperature=0.07):
    scores = F.normalize(S, dim=-1) @ F.normalize(T, dim=-1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(S)))


VECTORS, WIDER, TOKENS, FEW = (6, 5), (6, 9), (4, 3, 5), (2, 3, 20)
FEATURES = [
    ("rkd_distance_loss", {}, lambda S, T: huber(distances(S), distances(T)), VECTORS, WIDER),
    ("rkd_angle_loss", {}, lambda S, T: huber(angles(S), angles(T)), VECTORS, WIDER),
    ("similarity_loss", {}, similarity, VECTORS, WIDER),
    ("similarity_loss", {}, similarity, TOKENS, TOKENS),
    ("cka_loss", {}, cka, VECTORS, WIDER),
    ("cka_loss", {}, cka, TOKENS, (4, 3, 2)),
    ("cka_loss", {}, cka, FEW, (2, 3, 5)),
    ("infonce_loss", {}, infonce, VECTORS, VECTORS),
    (
        "infonce_loss",
        {"temperature": 0.5},
        functools.partial(infonce, temperature=0.5),
        VECTORS,
        VECTORS,
    ),
]


def compare(loss, formula, S, T):
    """In double precision to 1e-9 and in single to 1e-5: the value, and both sides' gradients."""
    sides = [torch.tensor(x, requires_grad=True) for x in (S, T)]
    expected = formula(*sides)
    expected.backward()
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-5)):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            S.astype(dtype), T.astype(dtype)
        )
        assert value.dtype == dtype
        pairs = [(value, expected), *zip(gradients, (x.grad for x in sides), strict=True)]
        for ours, theirs in pairs:
            theirs = theirs.detach().numpy()
            np.testing.assert_allclose(
                ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max()
            )


@pytest.mark.parametrize(("name", "options", "formula"), LOGITS, ids=[x[0] for x in LOGITS])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_on_logits(name, options, formula, temperature, x64):
    S, T = 3 * np.random.default_rng(0).normal(size=(2, 6, 5))
    loss = functools.partial(getattr(losses, name), temperature=temperature, **options)
    compare(loss, lambda S, T: formula(S, T, temperature), S, T)


@pytest.mark.parametrize(
    ("name", "options", "formula", "shape_S", "shape_T"), FEATURES, ids=[x[0] for x in FEATURES]
)
def test_losses_on_features(name, options, formula, shape_S, shape_T, x64):
    rng = np.random.default_rng(0)
    S, T = rng.normal(size=shape_S), rng.normal(size=shape_T)
    compare(functools.partial(getattr(losses, name), **options), formula, S, T)


def test_no_loss_of_ours_is_left_out():
    """What is not here is compared with TextBrewer's, or elsewhere."""
    here = {case[0] for case in (*LOGITS, *FEATURES)}
    new = (losses.divergences, losses.relations)
    defined = {
        name
        for module in new
        for name, _ in inspect.getmembers(module, inspect.isfunction)
        if name in losses.__all__ and getattr(losses, name).__module__ == module.__name__
    }
    assert defined and defined <= here


def test_one_temperature_for_each_position(x64):
    """The factor is each position's own."""
    S, T = 3 * np.random.default_rng(0).normal(size=(2, 6, 5))
    temperature = np.linspace(1, 4, 6)
    for name in ("kd_ce_loss", "kd_kl_loss", "kd_mse_loss", "kd_bce_loss", "kd_tvd_loss"):
        loss = getattr(losses, name)
        alone = [
            t**2 * loss(s[None], z[None], t) for s, z, t in zip(S, T, temperature, strict=True)
        ]
        together = loss(S, T, temperature, scale_by_t2=True)
        np.testing.assert_allclose(together, np.mean(alone), rtol=1e-12)
