"""Evaluates a finished run again, classifies images, and continues text.

python -m ist_jax.evaluate --workdir=runs/digits [--data_dir=DIR] [image.png ...]
python -m ist_jax.evaluate --workdir=runs/text --prompt="def main(" [--tokens=200] [--temperature=0.8]
"""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from absl import flags

from ist_jax import cli

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import PyTree
    from PIL import Image

    from ist_jax.data import Split
    from ist_jax.data.source import Vocabulary
    from ist_jax.masking import Params
    from ist_jax.runtime.run import Run

USAGE = "python -m ist_jax.evaluate --workdir=DIR [--data_dir=DIR] [--prompt=TEXT] [IMAGE ...]"
_CALIBRATION_BATCHES = 32


class Prompt(NamedTuple):
    """A text to continue: by so many tokens, the likeliest at temperature 0, else drawn."""

    text: str
    tokens: int = 200
    temperature: float = 0.0


def read_image(path: str) -> "Image.Image":
    """An image file as a PIL image.

    Raises:
      ValueError: the file is missing or not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return image.copy()
            paper = Image.new("RGBA", image.size, "white")  # what is seen through it
            return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    except OSError as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from None


def to_example(image: "Image.Image", shape: tuple[int, ...]) -> "np.ndarray":
    """A PIL image as uint8 [H, W, C], resized to the shape of a data set's images."""
    import numpy as np

    height, width, channels = shape
    resized = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    return np.asarray(resized, np.uint8).reshape(shape)


def is_inverted(picture: "Image.Image", images: "np.ndarray") -> bool:
    """Whether a picture has dark ink on a bright ground, and a set of grey images the reverse.

    Told by the borders.

    Args:
      picture: to classify.
      images: uint8 [N, H, W, C], of the set.
    """
    import numpy as np

    def border(x: "np.ndarray") -> float:
        """The median of [..., H, W]; ink may reach it."""
        return float(np.median(np.concatenate([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], axis=-1)))

    if images.shape[-1] != 1:
        return False
    return border(images[..., 0]) < 64 and border(np.asarray(picture.convert("L"))) > 128


def evaluate_workdir(
    workdir: Path, images: list[str], data_dir: str | None = None, prompt: Prompt | None = None
) -> None:
    """Evaluates a finished run, and again with BatchNorm's statistics re-estimated; classifies images.

    The first is the streamed evaluation of training; for the others the host's device holds the whole model.
    Runs on as many devices as are here, however many there were. An ensemble is evaluated with batch
    statistics, all nets together and each by itself.

    Args:
      workdir: of the run.
      images: files to classify.
      data_dir: where the data are now; None: where they were.
      prompt: to be continued by a language model.

    Raises:
      ValueError: there is no finished run of a config's model, an image cannot be read, or there is nothing
        that could continue a prompt.
    """
    import jax
    import numpy as np

    from ist_jax import config as configs
    from ist_jax import train
    from ist_jax.models import adapter, norm
    from ist_jax.runtime import inputs, scoring, setup
    from ist_jax.workdir import checkpoint, files

    recorded = files.read_config(workdir)
    config = configs.restore(recorded)
    if (custom := files.read_summary(workdir)["custom_model"]) is not None:
        name = custom.split("(")[0]
        raise ValueError(f"{workdir} holds a model of your own, {name}: evaluate it from Python")
    config.num_devices = 0
    if data_dir is not None:
        config.data.dir = data_dir
    saved = checkpoint.open_round(workdir, max(checkpoint.rounds(workdir), default=0))
    members = saved.members
    if images and members:
        raise ValueError(f"{workdir} holds an ensemble: images are classified by one model")
    if prompt and members:
        raise ValueError(f"{workdir} holds an ensemble: a prompt is continued by one model")
    if prompt and not prompt.text:
        raise ValueError("--prompt is empty; give some text to continue")
    params = {} if members else checkpoint.load_params(workdir)
    pictures = [read_image(name) for name in images]  # before the wait, so that a typo costs none
    if "given" in recorded and recorded["optimizer_state"] != "reset":  # moments that no config describes
        run = setup.set_up(config, params=params, evaluation_only=True)
        if not scoring.reads_params_alone(run.splits["test"].jaxpr, run.state):
            raise ValueError(f"{workdir} holds an optimizer of your own: evaluate it from Python")
    else:
        run = setup.set_up(config, start=saved, evaluation_only=True)
    encoded = run.inputs.dataset.encoded
    shown = None if encoded else run.inputs.test.get("image")
    if images and not encoded and (shown is None or shown.dtype != np.uint8 or shown.ndim != 4):
        raise ValueError(f"the examples of data.name={config.data.name!r} are no images: nothing to classify")
    if images and run.inputs.task.name != "classification":
        raise ValueError(f"what is learned is {run.inputs.task.name}: nothing to classify images by")
    vocabulary = run.inputs.dataset.vocabulary
    if prompt and vocabulary is None:
        raise ValueError(f"the examples of data.name={config.data.name!r} are no text: no prompt to continue")
    score = train.score(run, run.state)
    chosen = inputs.calibration_batches(run.inputs, _CALIBRATION_BATCHES)
    inputs_of = (run.inputs.task.show(batch)[0] for batch in chosen)
    statistics = {} if members else norm.estimate_batch_stats(run.model, params, inputs_of, run.scale)
    note = ", batch statistics" if members or statistics else ""
    print(f"test {score}, loss {score.loss:.4f} ({score.examples} examples{note})")
    for number, own in enumerate(score.members):
        value = score.metric.text(own[score.metric.name])
        print(f"net {number} by itself: test {score.metric.name} {value}, loss {own['loss']:.4f}")
    if members:
        return
    if prompt and vocabulary:
        print(prompt.text + _continue(run, params, vocabulary, prompt))

    variables = {"params": params, "batch_stats": statistics}
    if statistics:
        _score_again(run, variables)

    @jax.jit
    def predict(variables: "dict[str, Params]", batch: "Split") -> jax.Array:
        logits = adapter.apply(run.model, variables, run.inputs.task.show(batch)[0], scale=run.scale)
        return jax.nn.softmax(cast(jax.Array, logits))

    shape = run.inputs.task.example[0].shape[1:] if images else ()  # type: ignore[index]
    resized = functools.partial(to_example, shape=shape)
    fit = inputs.make_transform(run.inputs.wanted).centre if encoded else resized
    for name, picture in zip(images, pictures, strict=True):
        batch = {"image": fit(picture)[None], "label": np.zeros(1, np.int32)}
        probabilities = np.asarray(predict(variables, batch))[0]
        best, classes = probabilities.argsort()[::-1][:3], run.inputs.dataset.classes
        if not encoded and is_inverted(picture, run.inputs.test["image"]):
            print(f"{name}: it has bright borders, and {config.data.name} has bright ink on dark: invert it")
        print(f"{name}: " + ", ".join(f"{classes[k]} {probabilities[k]:.1%}" for k in best))


def _score_again(run: "Run", variables: "dict[str, PyTree]") -> None:
    """Prints the score by the statistics that are given."""
    from operator import itemgetter

    import jax
    import numpy as np

    from ist_jax.runtime import scoring

    score_fn = jax.jit(functools.partial(scoring.score_batch, run.model, run.inputs.task, run.scale))
    sums = []
    for chunk in run.splits["test"].chunks:
        flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), chunk)
        batches = (jax.tree.map(itemgetter(number), flat) for number in range(len(flat["weight"])))
        sums += [score_fn(variables, batch) for batch in batches]
    score = scoring.total_score(run.inputs.task, np.stack(sums))
    print(f"test {score} with BatchNorm statistics re-estimated on training batches")


def _continue(run: "Run", params: "Params", vocabulary: "Vocabulary", prompt: Prompt) -> str:
    """What follows a prompt."""
    import jax

    from ist_jax.models import adapter
    from ist_jax.tasks.language_modelling import sample

    @jax.jit
    def logits_of(params: "Params", tokens: jax.Array) -> jax.Array:
        logits = adapter.apply(run.model, {"params": params}, tokens, scale=run.scale)
        return cast(jax.Array, logits)[..., : vocabulary.size]

    example = run.inputs.task.example
    assert example is not None
    tokens, _ = vocabulary.encode(prompt.text)
    added = sample(
        functools.partial(logits_of, jax.device_put(params)),
        tokens.tolist(),
        prompt.tokens,
        length=example[0].shape[1],
        temperature=prompt.temperature,
        seed=run.inputs.wanted.seed,
    )
    return vocabulary.decode(added)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of a finished run", flag_values=values)
    flags.DEFINE_string("data_dir", None, "of the data, if they have moved", flag_values=values)
    cli.define_compilation_cache(values)
    flags.DEFINE_string("prompt", None, "text that a language model continues", flag_values=values)
    default = Prompt("")
    flags.DEFINE_integer("tokens", default.tokens, "how many it adds", 1, flag_values=values)
    flags.DEFINE_float(
        "temperature", default.temperature, "0: the likeliest token; else drawn", 0, flag_values=values
    )
    images = cli.parse(values, argv, USAGE, required=["workdir"], more=True)
    prompt = None if values.prompt is None else Prompt(values.prompt, values.tokens, values.temperature)
    from ist_jax.runtime import compilation_cache  # JAX starts here

    with cli.errors(), compilation_cache.kept(values.compilation_cache):
        evaluate_workdir(Path(values.workdir), images, values.data_dir, prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
