"""Outputs by attribute, key and position, and as a pytree."""

import jax
import jax.numpy as jnp
import pytest

from jaxbrewer.zoo import QuestionAnsweringModelOutput, SequenceClassifierOutput

LOGITS = jnp.ones((2, 3))
HIDDEN = (jnp.zeros((2, 4, 5)), jnp.ones((2, 4, 5)))


def test_the_three_ways_to_read():
    out = SequenceClassifierOutput(loss=jnp.float32(1), logits=LOGITS, hidden_states=HIDDEN)
    assert out.logits is out["logits"] is out[1]
    assert out.hidden_states is out["hidden_states"] is out[2] is out[-1]
    assert out[:2] == (out.loss, out.logits)
    assert out.get("attentions", 7) == 7 and out.get("logits") is LOGITS


def test_absent_fields_do_not_count():
    out = SequenceClassifierOutput(logits=LOGITS, hidden_states=HIDDEN)
    assert out[0] is LOGITS and out[1] is HIDDEN
    assert out.loss is None and "loss" not in out and "logits" in out
    assert len(out) == 2 and out.keys() == ["logits", "hidden_states"]
    logits, hidden = out
    assert (logits, hidden) == out.to_tuple()
    assert list(dict(out)) == list(dict(**out)) == ["logits", "hidden_states"]


def test_what_is_not_there():
    out = QuestionAnsweringModelOutput(start_logits=LOGITS, end_logits=LOGITS)
    with pytest.raises(
        IndexError, match=r"no item 2 .*end_logits in this order; hidden_states .*=True"
    ):
        out[2]
    with pytest.raises(KeyError, match="pass output_attentions=True"):
        out["attentions"]
    with pytest.raises(KeyError, match=r"which has \['start_logits', 'end_logits'\]"):
        out["logits"]


def test_an_output_is_a_pytree():
    out = SequenceClassifierOutput(logits=LOGITS, hidden_states=HIDDEN)
    doubled = jax.jit(lambda out: jax.tree.map(lambda x: 2 * x, out))(out)
    assert isinstance(doubled, SequenceClassifierOutput)
    assert doubled.loss is None
    assert (doubled.hidden_states[1] == 2).all()
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
    assert paths == [".logits", ".hidden_states[0]", ".hidden_states[1]"]
