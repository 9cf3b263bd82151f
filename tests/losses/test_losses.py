"""What every loss promises beside its numbers: masks, gradients, dtypes, compiles, errors."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import losses

BATCH, LENGTH, PADDING = 3, 5, 2
RAGGED = np.arange(LENGTH) < np.array([[2], [5], [3]])
LOWEST = float(np.finfo(np.float32).min)


def states(rng, length, width=4):
    return rng.normal(size=(BATCH, length, width)).astype(np.float32)


def attention(rng, length, heads=2):
    """Scores above the threshold below which a score counts as padding."""
    return rng.uniform(0, 3, (BATCH, heads, length, length)).astype(np.float32)


def by_head(rng, length, heads=2, width=3):
    """Queries, keys or values of a layer."""
    return rng.normal(size=(BATCH, heads, length, width)).astype(np.float32)


def two_layers(rng, length, width=4):
    return [states(rng, length, width) for _ in range(2)]


def padded_states(x, junk):
    return np.pad(x, ((0, 0), (0, PADDING), (0, 0)), constant_values=junk)


def padded_heads(x, junk):
    return np.pad(x, ((0, 0), (0, 0), (0, PADDING), (0, 0)), constant_values=junk)


def padded_attention(x, junk):
    """Queries that hold junk, and keys that a model's own mask has pushed down."""
    x = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, PADDING)), constant_values=-1e4 if junk else 0)
    return np.pad(x, ((0, 0), (0, 0), (0, PADDING), (0, 0)), constant_values=junk)


def with_labels(name, positions):
    """A loss by its name; to one that wants labels, class 1 is the label of every position."""
    loss = getattr(losses, name)
    if name == "kd_dkd_loss":
        return functools.partial(loss, labels=np.ones(positions, np.int32))
    return loss


@functools.cache
def compiled(case):
    """Value and gradients; one function a loss, so that tests share what was compiled."""
    return jax.jit(jax.value_and_grad(case, argnums=(0, 1)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, how to make one side of its input, and what is true of it."""

    name: str
    make: Callable = states
    pad: Callable = padded_states
    junk: float = np.nan  # what may stand at masked positions
    masked: bool = True  # whether the mask has an effect
    zero_at_equal: bool = True  # cross-entropies are stationary there instead
    still_at_equal: bool = True
    flat: bool = False  # it compares vectors: here one for each position

    def __str__(self):
        return self.name

    def __call__(self, S, T, mask=None):
        if self.flat:
            S, T = (jnp.reshape(x, (-1, x.shape[-1])) for x in (S, T))
            mask = None if mask is None else jnp.reshape(mask, -1)
        positions = jnp.shape(S)[:-1] if self.name.startswith("kd_") else ()
        return with_labels(self.name, positions)(S, T, mask=mask)

    def inputs(self, seed=0, length=LENGTH):
        rng = np.random.default_rng(seed)
        return self.make(rng, length), self.make(rng, length)

    def gradient(self, S, T, mask=None):
        return compiled(self)(S, T, mask)


CASES = [
    Case("kd_ce_loss", zero_at_equal=False),
    Case("kd_mse_loss"),
    Case("kd_bce_loss", zero_at_equal=False),
    Case("kd_margin_mse_loss"),
    Case("kd_listwise_kl_loss"),
    Case("kd_kl_loss"),
    Case("kd_reverse_kl_loss"),
    Case("kd_jsd_loss"),
    Case("kd_skew_kl_loss"),
    Case("kd_skew_reverse_kl_loss"),
    Case("kd_tvd_loss", still_at_equal=False),  # it has a kink there
    Case("kd_dkd_loss"),
    Case("kd_dist_loss"),
    Case("att_mse_loss", attention, padded_attention),
    Case("att_mse_sum_loss", attention, padded_attention),
    Case("att_ce_loss", attention, padded_attention, zero_at_equal=False),
    Case("att_ce_mean_loss", attention, padded_attention, zero_at_equal=False),
    Case("relation_loss", by_head, padded_heads),
    Case("hid_mse_loss"),
    Case("cos_loss"),
    Case("l2_loss"),
    Case("pkd_loss", masked=False),
    Case("fsp_loss", two_layers, junk=1e3),
    Case("mmd_loss", two_layers, junk=1e3),
    Case("rkd_distance_loss", flat=True),
    Case("rkd_angle_loss", flat=True),
    Case("similarity_loss"),
    Case("cka_loss"),
    Case("infonce_loss", zero_at_equal=False, still_at_equal=False, flat=True),
]
MASKED = [case for case in CASES if case.masked]
ATTENTION = [case for case in CASES if case.make is attention]

every = pytest.mark.parametrize("case", CASES, ids=str)
every_masked = pytest.mark.parametrize("case", MASKED, ids=str)
every_attention = pytest.mark.parametrize("case", ATTENTION, ids=str)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def assert_close(ours, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
        assert error <= tolerance * max(np.abs(y).max(), 1e-6)


def test_the_table_is_complete():
    assert [case.name for case in CASES] == losses.__all__


# --- Masks ----------------------------------------------------------------------------------------


@every_masked
def test_a_mask_equals_selection(case):
    """Padding, masked, changes neither the value nor the gradients, whatever it holds."""
    S, T = case.inputs()
    mask = np.ones((BATCH, LENGTH), bool)
    value, gradients = case.gradient(S, T, mask)
    padded = jax.tree.map(lambda x: case.pad(x, case.junk), (S, T))
    padded_mask = np.pad(mask, ((0, 0), (0, PADDING)))
    padded_value, padded_gradients = case.gradient(*padded, padded_mask)
    assert_close(padded_value, value)
    assert_close(padded_gradients, jax.tree.map(lambda g: case.pad(g, 0), gradients))


@every_masked
def test_a_mask_of_ones_is_no_mask(case):
    S, T = case.inputs()
    assert_close(case.gradient(S, T, np.ones((BATCH, LENGTH), bool)), case.gradient(S, T))


@every_masked
def test_a_mask_has_an_effect(case):
    S, T = case.inputs()
    assert abs(case.gradient(S, T, RAGGED)[0] - case.gradient(S, T)[0]) > 1e-3


@every
def test_a_mask_may_have_any_dtype(case):
    S, T = case.inputs()
    expected = case(S, T, RAGGED)
    for dtype in (jnp.uint8, jnp.int32, jnp.bfloat16, jnp.float32):
        assert case(S, T, jnp.asarray(RAGGED, dtype)) == expected


@every_masked
def test_an_empty_mask_gives_zero(case):
    value, gradients = case.gradient(*case.inputs(), np.zeros((BATCH, LENGTH), bool))
    assert value == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


@every_masked
def test_an_example_without_positions_is_harmless(case):
    mask = RAGGED.copy()
    mask[1] = False
    value, gradients = case.gradient(*case.inputs(), mask)
    assert value > 0
    assert all_finite(gradients)
    assert all((np.asarray(leaf)[1] == 0).all() for leaf in jax.tree.leaves(gradients))


def test_pkd_takes_no_notice_of_a_mask():
    S, T = states(np.random.default_rng(0), LENGTH), states(np.random.default_rng(1), LENGTH)
    expected = losses.pkd_loss(S, T)
    assert losses.pkd_loss(S, T, np.zeros((BATCH, LENGTH))) == expected
    assert losses.pkd_loss(S[:, 0], T, np.zeros((BATCH, LENGTH))) == expected


def test_many_masked_positions_are_counted_in_single_precision():
    """In float16 the count would overflow."""
    state = jnp.ones((2, 70_000, 1), jnp.float16)
    mask = jnp.ones((2, 70_000), jnp.float16)
    assert losses.hid_mse_loss(state, 0 * state, mask) == 1
    assert losses.cos_loss(state, -state, mask) == 2


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.startswith("kd_")])
def test_the_temperature_at_masked_positions_does_not_count(name):
    rng = np.random.default_rng(0)
    loss = with_labels(name, (BATCH, LENGTH))
    S, T = states(rng, LENGTH), states(rng, LENGTH)
    temperature = rng.uniform(1, 4, RAGGED.shape).astype(np.float32)
    expected = jax.grad(loss)(S, T, temperature, RAGGED)
    for junk in (0, np.nan):
        gradient = jax.grad(loss)(S, T, np.where(RAGGED, temperature, junk), RAGGED)
        np.testing.assert_array_equal(gradient, expected)


def test_equal_temperatures_are_one_temperature():
    S, T = states(np.random.default_rng(0), LENGTH), states(np.random.default_rng(1), LENGTH)
    for name in (name for name in losses.__all__ if name.startswith("kd_")):
        loss = with_labels(name, (BATCH, LENGTH))
        by_position = loss(S, T, jnp.full((BATCH, LENGTH), 4.0))
        assert by_position == loss(S, T, 4) == loss(S, T, jnp.float32(4))


# --- Values and gradients at the edges ------------------------------------------------------------


@every
def test_equal_sides(case):
    S, _ = case.inputs()
    value, (gradient, _) = case.gradient(S, S)
    if case.zero_at_equal:
        assert abs(value) < 1e-6
    if case.still_at_equal:
        assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(gradient))


@every
@pytest.mark.parametrize("zeros", ["S", "T", "both"])
def test_gradients_are_finite_at_zero_vectors(case, zeros):
    S, T = case.inputs()
    if zeros != "T":
        S = jax.tree.map(np.zeros_like, S)
    if zeros != "S":
        T = jax.tree.map(np.zeros_like, T)
    assert all_finite(case.gradient(S, T))
    assert all_finite(case.gradient(S, T, RAGGED))


@every_attention
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("score", [-1e4, "lowest", -np.inf])
def test_attention_losses_are_finite_where_scores_are_masked(case, score, dtype):
    """The model's own mask: low scores for padded keys, and for every key of a padded query."""
    lowest = float(jnp.finfo(dtype).min)
    S, T = (
        jnp.asarray(
            np.where(
                RAGGED[:, None, None] & RAGGED[:, None, :, None],
                scores,
                lowest if score == "lowest" else score,
            ),
            dtype,
        )
        for scores in case.inputs()
    )
    assert all_finite(case.gradient(S, T, RAGGED))
    if "mse" not in case.name or score != -np.inf:
        assert all_finite(case.gradient(S, T))


def test_the_lowest_scores_do_not_change_the_attention_losses():
    """The lowest number, its sum over heads and -inf mean what a very negative score means."""
    for case in ATTENTION:
        expected = None
        for score in (-1e4, LOWEST, -np.inf):
            S, T = (np.where(RAGGED[:, None, None], scores, score) for scores in case.inputs())
            value = case(S.astype(np.float32), T.astype(np.float32), RAGGED)
            expected = value if expected is None else expected
            assert_close(value, expected)


SOFTMAX = [
    name
    for name in losses.__all__
    if name.startswith("kd_") and "mse" not in name and name not in ("kd_bce_loss", "kd_dist_loss")
]


@pytest.mark.parametrize("name", SOFTMAX)
def test_logits_of_excluded_classes(name):
    """A class that both sides exclude adds nothing, however low its logit."""
    S, T = states(np.random.default_rng(0), LENGTH), states(np.random.default_rng(1), LENGTH)
    loss = with_labels(name, (BATCH, LENGTH))
    expected = loss(S, T, 0.5)
    for low in (-1e4, LOWEST, -np.inf):
        low_class = np.full((BATCH, LENGTH, 1), low, np.float32)
        S_more, T_more = (np.concatenate([x, low_class], -1) for x in (S, T))
        value, gradient = jax.value_and_grad(loss)(S_more, T_more, 0.5)
        assert_close(value, expected)
        assert np.isfinite(gradient).all()


def test_known_values():
    S, T = jnp.array([[3.0, 4.0]]), jnp.array([[4.0, -3.0]])
    assert_close(losses.hid_mse_loss(S, T), 25.0)
    assert_close(losses.kd_mse_loss(S, T, 5), 1.0)
    assert_close(losses.cos_loss(S, T), 1.0)
    assert_close(losses.pkd_loss(S, T), 2.0)
    assert_close(losses.l2_loss(S, T), 50**0.5)
    assert_close(losses.kd_margin_mse_loss(S, T), 64.0)
    uniform = jnp.zeros((2, 8))
    assert_close(losses.kd_ce_loss(uniform, uniform, 2), np.log(8))
    # One position of width 2 and 4: the Gram matrices are 25 / 2 and 4 / 4.
    wide = jnp.ones((1, 1, 4))
    assert_close(losses.mmd_loss([S[None], S[None]], [wide, wide]), 11.5**2)
    assert_close(losses.mmd_loss([S[None], S[None]], [wide, wide], jnp.ones((1, 1))), 11.5**2)


def test_a_number_of_relation_heads_is_whole():
    with pytest.raises(ValueError, match=r"2\.5 relation heads.*heads=15\)"):
        losses.relation_loss(A, A, heads=2.5)


def test_relation_heads_are_cut_anew():
    """Two heads of six numbers and four of three, side by side, are one layer of twelve."""
    rng = np.random.default_rng(0)
    T = rng.normal(size=(2, 5, 12)).astype(np.float32)
    S = rng.normal(size=(2, 5, 8)).astype(np.float32)

    def heads(x, count):
        return x.reshape(2, 5, count, -1).swapaxes(1, 2)

    expected = losses.relation_loss(S, T, heads=4)
    assert_close(losses.relation_loss(heads(S, 2), heads(T, 4)), expected)
    assert_close(losses.relation_loss(heads(S, 8), heads(T, 2), heads=4), expected)
    assert abs(losses.relation_loss(heads(S, 2), heads(T, 2)) - expected) > 1e-3


# --- Dtypes and compiles --------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_computed_in_single_precision(case, dtype):
    halves = jax.tree.map(lambda x: jnp.asarray(x, dtype), case.inputs())
    singles = jax.tree.map(lambda x: np.asarray(x, np.float32), halves)
    value, gradients = case.gradient(*halves, RAGGED)
    expected, single_gradients = case.gradient(*singles, RAGGED)
    assert value.dtype == jnp.float32 and value.shape == ()
    assert_close(value, expected)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(gradients))
    assert_close(gradients, single_gradients, 2 * float(jnp.finfo(dtype).eps))
    for sides in (halves, (halves[0], singles[1])):
        for mask in (None, RAGGED.astype(dtype)):
            assert jax.eval_shape(case, *sides, mask).dtype == jnp.float32


@every
def test_double_precision_stays(case, x64):
    S, T = jax.tree.map(np.float64, case.inputs())
    for dtype in (bool, np.int64, np.float32):
        assert jax.eval_shape(case, S, T, np.ones((BATCH, LENGTH), dtype)).dtype == jnp.float64
    assert jax.eval_shape(case, S, T).dtype == jnp.float64


@every
def test_single_precision_stays_under_a_double_mask(case, x64):
    mask = np.ones((BATCH, LENGTH), np.float64)
    assert jax.eval_shape(case, *case.inputs(), mask).dtype == jnp.float32


@every
def test_no_second_compile(case):
    step = jax.jit(jax.value_and_grad(case))
    mask = np.ones((BATCH, LENGTH), np.int32)
    compiles = []

    def listen(event, duration, **more):
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        step(*case.inputs(), mask)
        assert compiles
        compiles.clear()
        step(*case.inputs(seed=1), 1 - mask)
        assert not compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --- Errors ---------------------------------------------------------------------------------------

X = np.ones((2, 5, 4), np.float32)
WIDE = np.ones((2, 5, 8), np.float32)
LONG = np.ones((2, 6, 4), np.float32)
A = np.ones((2, 3, 5, 5), np.float32)
MASK = np.ones((2, 5), np.float32)
EXTENDED = np.ones((2, 1, 1, 5), np.float32)

ERRORS = [
    # Widths
    ("hid_mse_loss", (X, WIDE), ["(2, 5, 4)", "(2, 5, 8)", "'proj': ['linear', 4, 8]"]),
    ("cos_loss", (X, WIDE), ["(2, 5, 4)", "(2, 5, 8)", "'proj': ['linear', 4, 8]"]),
    ("l2_loss", (X, WIDE), ["(2, 5, 4)", "(2, 5, 8)", "'proj': ['linear', 4, 8]"]),
    ("pkd_loss", (X, WIDE), ["(2, 4)", "(2, 8)", "'proj': ['linear', 4, 8]"]),
    ("fsp_loss", ([X, X], [X, WIDE]), ["layer 1", "4 and 8", "'proj': ['linear', 4, 8]"]),
    ("mmd_loss", ([X, WIDE], [X, X]), ["state_S", "(2, 5, 4)", "(2, 5, 8)", "one width"]),
    ("kd_ce_loss", (X, WIDE), ["classes, got 4 and 8", "head for the teacher's classes"]),
    ("kd_mse_loss", (X[:, 0], WIDE[:, 0]), ["(2, 4)", "(2, 8)", "classes"]),
    ("kd_margin_mse_loss", (X[..., :1], X[..., :1]), ["(2, 5, 1)", "2 or more candidates"]),
    ("kd_listwise_kl_loss", (X[..., :1], X[..., :1]), ["(2, 5, 1)", "2 or more candidates"]),
    # Lengths, batches, heads, ranks
    ("hid_mse_loss", (X, LONG), ["(2, 5, 4)", "(2, 6, 4)", "length, got 5 and 6"]),
    ("mmd_loss", ([X, X], [LONG, LONG]), ["length, got 5 and 6", "inputs of one"]),
    ("mmd_loss", ([X, LONG], [X, X]), ["state_S", "(2, 6, 4)", "(batch, length, width)"]),
    ("fsp_loss", ([X, X], [X[:1], X[:1]]), ["batch, got 2 and 1"]),
    ("fsp_loss", ([X, X], [LONG, LONG], MASK), ["state_T", "(2, 6)", "mask", "(2, 5)"]),
    ("att_mse_loss", (A, A[:, :2]), ["heads, got 3 and 2", "attention_mse_sum"]),
    ("att_ce_loss", (A, A[..., :4, :4]), ["key length, got 5 and 4"]),
    ("att_mse_sum_loss", (A, A[:1]), ["batch, got 2 and 1"]),
    ("hid_mse_loss", (X, X[:, 0]), ["(2, 5, 4)", "(2, 4)", "the same kind"]),
    ("hid_mse_loss", (X[0, 0], X[0, 0]), ["(4,)", "(batch, length, width)"]),
    ("pkd_loss", (A, A), ["state_S", "(2, 3, 5, 5)", "(batch, width)"]),
    ("att_mse_loss", (X, X), ["(2, 5, 4)", "(batch, heads, length, length)"]),
    ("att_ce_loss", (A[:, 0], A[:, 0]), ["attention_ce_mean"]),
    ("att_ce_mean_loss", (MASK, MASK), ["(2, 5)", "or (batch, length, length)"]),
    ("mmd_loss", ([MASK, MASK], [X, X]), ["(2, 5)", "(batch, length, width)"]),
    ("kd_ce_loss", (1.0, X), ["logits_S is a scalar"]),
    ("relation_loss", (A, A[:, :, :4]), ["length, got 5 and 4"]),
    ("relation_loss", (A, MASK), ["vectors_T has shape (2, 5)", "(batch, heads, length, width of"]),
    ("relation_loss", (A, X), ["without heads", "heads=…"]),
    ("relation_loss", (X, A), ["3 relation heads", "4 numbers", "teacher's 15", "heads=1"]),
    # Lists and arrays
    ("hid_mse_loss", ([X, X], X), ["state_S is a list of 2", "single layers"]),
    ("att_ce_loss", (A, (A, A)), ["attention_T is a list of 2", "single layers"]),
    ("kd_mse_loss", ([X], X), ["logits_S is a list of 1"]),
    ("mmd_loss", (X, [X, X]), ["state_S", "(2, 5, 4)", "lists of two layers", "[0, 2]"]),
    ("fsp_loss", ([X, X], [X, X, X]), ["state_T", "a list of 3", "lists of two layers"]),
    ("fsp_loss", ([X, X], None), ["state_T", "None", "lists of two layers"]),
    ("mmd_loss", ([X, None], [X, X]), ["state_S[1] is None"]),
    ("att_mse_loss", (None, A), ["attention_S is None"]),
    # Masks and temperatures
    ("hid_mse_loss", (X, X, MASK[:, :4]), ["mask", "(2, 4)", "(2, 5)"]),
    ("cos_loss", (X, X, MASK[..., None]), ["mask", "(2, 5, 1)", "(2, 5)"]),
    ("att_mse_loss", (A, A, EXTENDED), ["(2, 1, 1, 5)", "(2, 5)", "not a broadcast or additive"]),
    ("att_ce_mean_loss", (A, A, [MASK]), ["mask is a list of 1", "(2, 5)"]),
    ("att_ce_loss", (A[..., :4], A[..., :4], MASK), ["(2, 3, 5, 4)", "cross-attention"]),
    ("mmd_loss", ([X, X], [X, X], MASK[:1]), ["mask", "(1, 5)", "(2, 5)"]),
    ("relation_loss", (A, A, EXTENDED), ["(2, 1, 1, 5)", "(2, 5)", "not a broadcast"]),
    ("kd_ce_loss", (X, X, 1, MASK[0]), ["mask", "(5,)", "(2, 5)"]),
    ("kd_ce_loss", (X, X, MASK[:, 0]), ["temperature", "(2,)", "(2, 5)"]),
    ("kd_mse_loss", (X, X, MASK[..., None]), ["temperature", "(2, 5, 1)", "(2, 5)"]),
]


@pytest.mark.parametrize(("name", "inputs", "words"), ERRORS, ids=[e[0] for e in ERRORS])
def test_errors(name, inputs, words):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: getattr(losses, name)(*inputs))
    for word in (name, *words):
        assert word in str(error.value)


def test_fsp_without_a_mask_takes_other_lengths():
    """Its Gram matrices are over features."""
    assert losses.fsp_loss([X, X], [LONG, LONG]) == 0
