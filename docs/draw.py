"""Draws the pictures of these pages into ``images/``: ``python docs/draw.py`` (extra ``plot``).

The curves are computed with jaxbrewer's own losses and schedules.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jaxbrewer.losses import kd_ce_loss
from jaxbrewer.presets import WEIGHT_SCHEDULER, bound

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "jaxbrewer", "font.size": 9, "svg.fonttype": "path"})
from matplotlib import pyplot

IMAGES = Path(__file__).parent / "images"
INK, BLUE, ORANGE, GREEN, PALE = "#333333", "#1f5f99", "#b3591b", "#2c7a4b", "#f4f6f8"
LOGITS = jnp.array([6.0, 4.0, 1.0, 0.0, -2.0])
TEMPERATURES = (1, 2, 4, 8)


# ------------------------------------------------------------------------------------- concepts


def box(x, y, width, height, lines, colour=INK, fill="white", dash=""):
    """A box with its lines of text in the middle; the first is bold."""
    middle, top = x + width / 2, y + height / 2 - 9 * (len(lines) - 1) + 5
    said = [
        f'<text x="{middle}" y="{top + 18 * i}" font-weight="{"normal" if i else "bold"}" '
        f'fill="{colour if i == 0 else INK}">{line}</text>'
        for i, line in enumerate(lines)
    ]
    frame = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"/>'
    )
    return [frame, *said]


def arrow(*points, colour=INK, dash=""):
    """A line through points that ends in a head."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" '
        f'stroke-dasharray="{dash}" marker-end="url(#head)"/>'
    ]


def note(x, y, text, colour=INK, anchor="middle"):
    """A small line of text."""
    return [
        f'<text x="{x}" y="{y}" font-size="12" fill="{colour}" text-anchor="{anchor}">{text}</text>'
    ]


def concepts():
    """Both sides, the matches between them, the loss, and the way of a job."""
    parts = [
        *box(10, 130, 100, 56, ["batch", "dict or tuple"]),
        *box(150, 30, 130, 72, ["teacher", "frozen,", "evaluation mode"], BLUE),
        *box(150, 214, 130, 72, ["student", "trained"], ORANGE),
        *box(338, 38, 112, 56, ["adaptor_T", "batch, outputs"], BLUE, dash="5 3"),
        *box(338, 222, 112, 56, ["adaptor_S", "batch, outputs"], ORANGE, dash="5 3"),
        *box(480, 22, 170, 88, ["results_T", "logits", "hidden 0 1 2 … 12"], BLUE),
        *box(480, 206, 170, 88, ["results_S", "logits, losses, masks", "hidden 0 1 2 3"], ORANGE),
        *box(690, 112, 160, 92, ["loss", "KD + hard labels", "+ Σ weight · match"], GREEN),
        *arrow((110, 150), (130, 150), (130, 66), (148, 66)),
        *arrow((110, 166), (130, 166), (130, 250), (148, 250)),
        *arrow((280, 66), (336, 66)),
        *arrow((280, 250), (336, 250)),
        *arrow((450, 66), (478, 66)),
        *arrow((450, 250), (478, 250)),
        *note(308, 58, "outputs"),
        *note(308, 242, "outputs"),
        *arrow((580, 206), (580, 112), colour=GREEN),
        *arrow((610, 206), (610, 112), colour=GREEN),
        *note(570, 164, "matches", GREEN, "end"),
        *arrow((650, 66), (770, 66), (770, 110)),
        *arrow((650, 250), (740, 250), (740, 206)),
        *arrow((800, 204), (800, 318), (215, 318), (215, 288), colour=ORANGE, dash="5 3"),
        *note(500, 336, "gradient, optimizer: the student and the projections", ORANGE),
    ]
    stations = [
        (10, 140, ["Job", "configs, two sides"]),
        (178, 152, ["preflight", "first batch, by shape"]),
        (358, 172, ["step", "one compiled program"]),
        (558, 120, ["loop", "batches, I/O"]),
        (706, 144, ["Outcome", "the trained student"]),
    ]
    for x, width, lines in stations:
        parts += box(x, 380, width, 52, lines, fill=PALE)
    for (x, width, _), (end, *_) in itertools.pairwise(stations):
        parts += arrow((x + width, 406), (end - 2, 406))
    parts += arrow((254, 432), (254, 458), (320, 458))
    parts += note(328, 462, "or one report of all that is wrong, each with its fix", anchor="start")
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 480" font-family="Helvetica, Arial, '
        'sans-serif" font-size="14" text-anchor="middle">'
        "<title>Teacher, student, adaptors, matches and loss; job, preflight, step, loop, outcome</title>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
        '<rect width="860" height="480" fill="white"/>'
    )
    text = "\n".join([head, *parts, "</svg>\n"])
    (IMAGES / "concepts.svg").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------- curves


def save(figure, name):
    """Writes a figure that is the same each time."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def soft_labels():
    """One example's five logits as probabilities, at four temperatures."""
    figure, axes = pyplot.subplots(figsize=(7, 2.6))
    for i, temperature in enumerate(TEMPERATURES):
        axes.bar(
            np.arange(5) + 0.2 * (i - 1.5), jax.nn.softmax(LOGITS / temperature), 0.19,
            label=f"τ = {temperature}", color=pyplot.cm.viridis(i / 4),
        )  # fmt: skip
    axes.set(
        xticks=range(5),
        xticklabels=[f"class with logit {x:g}" for x in LOGITS],
        ylabel="probability",
    )
    axes.tick_params("x", labelsize=8)
    axes.legend(frameon=False)
    save(figure, "soft_labels")


def gradient_sizes(temperatures, **options):
    """The norm of the KD loss's gradient at each temperature, for a student that knows nothing yet."""

    def norm(temperature):
        def loss(z):
            return kd_ce_loss(z, LOGITS[None], temperature, **options)

        return jnp.linalg.norm(jax.grad(loss)(jnp.zeros((1, 5))))

    return np.array([norm(t) for t in temperatures])


def gradients():
    """How the KD loss's gradient shrinks with the temperature, and what the factor τ² does to it."""
    temperatures = np.geomspace(1, 20, 30)
    plain = gradient_sizes(temperatures)
    figure, axes = pyplot.subplots(figsize=(7, 2.6))
    axes.plot(temperatures, plain, label="ce, as TextBrewer's", color=BLUE)
    scaled = gradient_sizes(temperatures, scale_by_t2=True)
    axes.plot(temperatures, scaled, label="with scale_by_t2", color=ORANGE)
    axes.axhline(plain[0], color="grey", linewidth=1, linestyle=":", label="at τ = 1")
    axes.set(xscale="log", yscale="log", xlabel="temperature τ", ylabel="size of the gradient")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    save(figure, "gradients")


def schedules():
    """Weight schedules over a training."""
    shown = {
        "linear_decay": "linear_decay",
        '["step", {"at": 0.3}]': ["step", {"at": 0.3}],
        '["linear", {"start": 1, "end": 0.2, "warmup": 0.1}]': [
            "linear", {"start": 1, "end": 0.2, "warmup": 0.1},
        ],
        '["cosine", {"start": 1, "end": 0}]': ["cosine", {"start": 1, "end": 0}],
    }  # fmt: skip
    x = np.linspace(0, 1, 201)
    figure, axes = pyplot.subplots(figsize=(7, 2.6))
    for label, given in shown.items():
        scheduler = bound(WEIGHT_SCHEDULER, given)
        axes.plot(x, [scheduler(part) for part in x], label=label)
    axes.set(xlabel="finished part of the training", ylabel="weight")
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    save(figure, "schedules")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for draw in (concepts, soft_labels, gradients, schedules):
        draw()
