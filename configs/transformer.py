"""A decoder-only language model of GPT-2's form, its heads and neurons dealt to the workers, layer by layer.

python -m ist_jax.main --config=configs/transformer.py            bytes of Python's own library, on a CPU
python -m ist_jax.main --config=configs/transformer.py:smoke      the same machinery in seconds
python -m ist_jax.main --config=configs/transformer.py:text --config.data.path=FILE,FILE
                                                                  any UTF-8 files, by bytes or by
                                                                  --config.data.tokenizer=tokenizer.json
python -m ist_jax.plan --config=configs/transformer.py:gpt2_small
                                                                  124 million weights, for accelerators

--config.partition.units=blocks deals out whole blocks, as ResIST does, and 'all' parts of the shared ones as
well. --config.method=local_sgd --config.outer.name=nesterov is DiLoCo.
"""

from ml_collections import config_dict

from ist_jax.config import choose, make

BASE = {
    "data.name": "text",
    "local_steps": 20,
    "batch_size": 16,
    "eval_every": 20,
    "checkpoint.every": 40,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.b2": 0.95,
    "optimizer.weight_decay": 0.1,
    "optimizer.decayed": "kernels",
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.05,
}
CHARS = {
    "model.layers": 10,
    "model.d_model": 64,
    "batch_size": 8,
    "epochs": 6.0,
    "eval_every": 30,
    "checkpoint.every": 30,
}
SMOKE = {
    "num_workers": 2,
    "local_steps": 2,
    "batch_size": 4,
    "rounds": 3,
    "eval_every": 2,
    "checkpoint.every": 1,
    "data.length": 16,
    "model.layers": 3,
    "model.d_model": 16,
    "model.heads": 2,
}
MODES = {
    "chars": CHARS,
    "smoke": SMOKE,
    "text": {"data.length": 256, "model.d_model": 256, "epochs": 4.0},
    "gpt2_small": {
        "model.layers": 12,
        "model.d_model": 768,
        "model.heads": 12,
        "model.vocabulary": 50_257,  # of GPT-2's tokenizer; bytes are fewer
        "data.length": 1024,
        "num_workers": 4,
        "local_steps": 100,
        "batch_size": 32,
        "rounds": 400,
        "eval_every": 10,
        "checkpoint.every": 10,
        "compute_dtype": "bfloat16",
        "partition.shared_layers": 2,
        "optimizer.learning_rate": 6e-4,
        "optimizer.warmup": 0.02,
    },
}


def get_config(mode: str = "chars") -> config_dict.ConfigDict:
    """The experiment of a mode; every value can be overridden: --config.num_workers=8."""
    return make("transformer", BASE, choose(MODES, mode))
