"""IST (arXiv:1910.02120): a feed-forward net, its hidden neurons dealt to the workers.

python -m ist_jax.main --config=configs/mlp.py            scikit-learn's digits, seconds
python -m ist_jax.main --config=configs/mlp.py:smoke      the same machinery, a few rounds
python -m ist_jax.main --config=configs/mlp.py:speech2 --config.data.dir=DIR
                                                          the paper's speech net; also speech3
python -m ist_jax.main --config=configs/mlp.py:delicious --config.data.dir=DIR
                                                          sparse inputs, 983 labels; seconds on a CPU
python -m ist_jax.main --config=configs/mlp.py:amazon670k --config.data.dir=DIR
                                                          the paper's largest net, on 8 devices

DIR of the speech nets is the unpacked Speech Commands archive, a folder of WAV files per word; of the
others it holds train.txt and test.txt (or *_train.txt and *_test.txt). Two cores of an Intel Xeon, 4
workers, mean of three seeds, 2026-11-30: digits 98.70 % in 2.1 s of rounds; delicious P@1 64.96 % in 1.8 s.
speech2 on ten words (1,138 clips, 80 epochs, 2 workers, 2026-11-22):
57.92 %. speech3 and amazon670k have not been trained at full size. More in benchmarks/RESULTS.md. The
paper's figures on all 35 words: .8153 (speech2) and .8327 (speech3) against .7998 and .7992 of local SGD.

The paper's P@1/3/5 on Amazon-670k (135,909 features, 670,091 labels, two-layer net of width H):

    H = 512   .3962/.3604/.3313, data-parallel .3861/.3454/.3164; no larger net fits data-parallel's devices
    H = 1024  .4089/.3685/.3392    H = 1536  .4320/.3907/.3614    H = 2048  .4365/.3936/.3637
    H = 2560  .4384/.3944/.3658, 8 workers

Its batch, learning rate and local steps are not known: those of amazon670k follow delicious, and have not
been tried at that size.
"""

from ml_collections import config_dict

from ist_jax.config import choose, make

BASE = {"epochs": 400.0, "optimizer.learning_rate": 0.05}
SPEECH = {
    "data.name": "speech_commands",
    "data.clip_length": "drop",
    "num_workers": 2,
    "batch_size": 128,
    "epochs": 100.0,
    "optimizer.learning_rate": 0.01,
    "optimizer.momentum": 0.0,
}
SPARSE = {
    "model.output_norm": False,  # it makes every label equally likely
    "model.hidden": (1024,),
    "local_steps": 20,
    "batch_size": 32,
    "epochs": 5.0,
    "optimizer.learning_rate": 0.1,
    "optimizer.schedule": "cosine",
}
SMOKE = {"num_workers": 2, "local_steps": 2, "rounds": 3, "eval_every": 2, "checkpoint.every": 1}
MODES = {
    "digits": {"eval_every": 15},  # an evaluation takes a third of a round's time
    "smoke": SMOKE | {"batch_size": 8, "model.hidden": (32, 32)},
    "speech2": SPEECH | {"model.hidden": (4096,), "local_steps": 20},
    "speech3": SPEECH | {"model.hidden": (8192, 8192), "local_steps": 30},
    "delicious": SPARSE | {"data.name": "delicious"},  # 'extreme_classification' for another such set
    "amazon670k": {
        **SPARSE,
        "data.name": "amazon670k",
        "model.hidden": (2560,),
        "num_workers": 8,
        "batch_size": 128,
        "epochs": 50.0,  # at most; stopped by the validation split
        "eval_every": 24,  # about once in a pass
        "patience": 3,
        "data.validation": 0.02,
        "checkpoint.every": 240,  # 8 GB each
        "optimizer.schedule": "constant",
    },
}


def get_config(mode: str = "digits") -> config_dict.ConfigDict:
    """The experiment of a mode; every value can be overridden: --config.num_workers=8."""
    return make("mlp", BASE, choose(MODES, mode))
