"""ResIST (arXiv:2107.00961): a pre-activation ResNet, its blocks dealt to the workers.

python -m ist_jax.main --config=configs/resnet.py                 scikit-learn's digits, 15 seconds
python -m ist_jax.main --config=configs/resnet.py:smoke           the same machinery in seconds
python -m ist_jax.main --config=configs/resnet.py:cifar10_small --config.data.dir=DIR
                                                                  a net and schedule for a CPU
python -m ist_jax.main --config=configs/resnet.py:cifar10 --config.data.dir=DIR
                                                                  the paper's; also cifar100, and svhn
                                                                  by the same numbers
python -m ist_jax.main --config=configs/resnet.py:imagenet --config.data.dir=DIR
                                                                  the paper's; or a folder's, with
                                                                  --config.data.name=image_folder

DIR is tensorflow-datasets' data_dir. Two cores of an Intel Xeon, 2026-11-30: digits 99.44 % in 4.9 s of
rounds, after 4 s of start where programs are kept, else 10, mean of three seeds; cifar10_small 64.1 %
(local SGD 66.8) after 48 rounds, one seed each, version 0.1, with its ablation in benchmarks/RESULTS.md:
before strided 3x3 convolutions padded one pixel on each side, and to be measured again. The others have not
been trained at full size. The paper's figures for cifar10 / cifar100 with S = 4: 92.35 / 71.30 % (local SGD
92.90 / 71.51), best test accuracy of a run, mean of three; 22 blocks dealt out, 6 per worker (S = 2: 11,
epochs 80; S = 8: 4); ResNet152 and ResNet200 have 36 and 50 blocks in section 3 and l = 100.

Its figures for ImageNet, top-1 with S = 2 / 4: 71.60 / 70.74 % in 36.79 / 22.37 hours (local SGD 73.32 /
72.66 % in 48.61 / 29.29 hours). DIR has TFDS's imagenet2012 or, as a folder, train/<class>/*.JPEG and
val/<class>/*.JPEG. What is known of the paper's net is that 7,546.8 GB of local SGD would be 31.4 million
parameters. Here it is ResNet101 of bottleneck blocks, 44.5 million, of which 22 blocks are dealt out, 10 per
worker (S = 2: 11); ResNet50 and ResNet152 have model.sections (3, 4, 6, 3) and (3, 8, 36, 3). The paper
restarts momentum every 1,300 rounds, here every round does; --config.optimizer_state=carry never.
"""

from ml_collections import config_dict

from ist_jax.config import choose, make

BASE = {
    "local_steps": 10,
    "batch_size": 32,
    "checkpoint.every": 10,
    "data.pad": 1,
    "optimizer.weight_decay": 5e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.05,
}
CIFAR = {"data.pad": 4, "data.flip": True, "eval_batch_size": 100}
RESNET101 = {"model.sections": (3, 4, 23, 3), "model.width": 64}
PAPER = {
    **CIFAR,
    **RESNET101,
    "partition.min_units": 6,
    "local_steps": 50,
    "batch_size": 128,
    "epochs": 160.0,
    "optimizer.learning_rate": 0.03,
    "optimizer.schedule": "step",
    "optimizer.warmup": 0.0,
}
SMOKE = {"num_workers": 2, "local_steps": 2, "rounds": 3, "eval_every": 2, "checkpoint.every": 1}
MODES = {
    "digits": {},
    "smoke": SMOKE
    | {"batch_size": 8, "model.sections": (1, 3), "model.width": 4, "partition.sections": (2,)},
    "cifar10_small": {
        **CIFAR,
        "data.name": "cifar10",
        "partition.min_units": 3,  # of 8; without overlap 2
        "local_steps": 20,
        "batch_size": 64,
        "epochs": 4.9,
    },
    "cifar10": PAPER | {"data.name": "cifar10"},
    "cifar100": PAPER | {"data.name": "cifar100"},
    "svhn": PAPER | {"data.name": "svhn_cropped", "data.flip": False},  # a mirrored digit is another sign
    "imagenet": {
        **RESNET101,
        "data.name": "imagenet2012",  # or 'image_folder': train/<class>/*.JPEG and val/<class>/*.JPEG
        "data.pad": 0,
        "data.flip": True,
        "model.block": "bottleneck",
        "model.stem": "imagenet",
        "partition.min_units": 10,
        "partition.warmup_epochs": 5.0,  # the paper has "a few"
        "local_steps": 15,
        "batch_size": 256,
        "epochs": 90.0,
        "eval_every": 167,  # rounds: two epochs
        "checkpoint.every": 167,  # with each evaluation, so that the best one is kept
        "eval_batch_size": 250,
        "optimizer.schedule": "step",
        "optimizer.step_at": (30 / 90, 60 / 90),
        "optimizer.warmup": 0.0,
        "optimizer.weight_decay": 1e-4,  # not in the paper; usual for this net
    },
}


def get_config(mode: str = "digits") -> config_dict.ConfigDict:
    """The experiment of a mode; every value can be overridden: --config.num_workers=8."""
    return make("resnet", BASE, choose(MODES, mode))
