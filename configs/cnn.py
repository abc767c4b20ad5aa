"""Convolutional nets, their channels dealt to the workers (IST, arXiv:1910.02120; LoFT, AISTATS 2023).

python -m ist_jax.main --config=configs/cnn.py                    scikit-learn's digits
python -m ist_jax.main --config=configs/cnn.py:smoke              the same machinery in seconds
python -m ist_jax.main --config=configs/cnn.py:small --config.data.dir=DIR
                                                                  CIFAR-10, by a net for a CPU
python -m ist_jax.main --config=configs/cnn.py:resnet18 --config.data.dir=DIR
                                                                  CIFAR-10, at the papers' size
python -m ist_jax.main --config=configs/cnn.py:vgg12 --config.data.dir=DIR
                                                                  ImageNet; or a folder's, with
                                                                  --config.data.name=image_folder

DIR is tensorflow-datasets' data_dir. All but vgg12 are pre-activation ResNets, of which
--config.partition.channels says what is dealt out: the channels inside a block (inner, as LoFT), or those
that run from block to block, too (all). vgg12 on small images, with as many sections as they can be halved:

    --config=configs/cnn.py:vgg12 --config.data.name=cifar10 --config.data.pad=4 --config.model.dense="(512,)"

The papers' figures. IST, CIFAR-10 by a ResNet18: .9102, local SGD .9087, data-parallel SGD .9128; the number
of workers is not known, nor is how the net is cut. IST, VGG12 on the whole of ImageNet (21,841 classes),
right among the first ten: .3802, .3685 and .3688. LoFT, PreAct-ResNet18 on CIFAR-10: 94.11 % with 2 workers
(local SGD 94.41) for 40.0 GB in place of 55.4, and 94.13 % with 4 (94.81).

Which layers VGG12 has, IST does not say: here ten convolutions, as of VGG13, a dense layer and the logits.
Batch and learning rate of both are not known: resnet18 follows ResIST's numbers, vgg12 those of
configs/resnet.py:imagenet, with 80 local steps, IST's fewest for it.
"""

from ml_collections import config_dict

from ist_jax.config import choose, make

BASE = {
    "local_steps": 10,
    "batch_size": 32,
    "checkpoint.every": 10,
    "optimizer.weight_decay": 5e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.05,
}
RESNET = {"partition.channels": "inner", "data.pad": 1}
CIFAR = {"data.name": "cifar10", "data.pad": 4, "data.flip": True, "eval_batch_size": 100}
IN_ALL = {"model.sections": (2, 2, 2, 2), "partition.sections": (1, 2, 3, 4)}
SMOKE = {"num_workers": 2, "local_steps": 2, "rounds": 3, "eval_every": 2, "checkpoint.every": 1}
MODES = {
    "digits": RESNET | {"model.sections": (2, 2, 2), "model.width": 16, "partition.sections": (1, 2, 3)},
    "smoke": RESNET
    | SMOKE
    | {"batch_size": 8, "model.sections": (1, 2), "model.width": 4, "partition.sections": (1, 2)},
    "small": RESNET
    | CIFAR
    | IN_ALL
    | {"model.width": 32, "local_steps": 20, "batch_size": 64, "epochs": 4.0, "eval_every": 13},
    "resnet18": RESNET
    | CIFAR
    | IN_ALL
    | {
        "model.width": 64,
        "local_steps": 50,
        "batch_size": 128,
        "epochs": 160.0,
        "optimizer.learning_rate": 0.03,
        "optimizer.schedule": "step",
        "optimizer.warmup": 0.0,
    },
    "vgg12": {
        "data.name": "imagenet2012",  # or 'image_folder': train/<class>/*.JPEG and val/<class>/*.JPEG
        "data.flip": True,
        "local_steps": 80,
        "batch_size": 256,
        "epochs": 90.0,
        "eval_every": 32,  # rounds: about two epochs
        "checkpoint.every": 32,
        "eval_batch_size": 250,
        "optimizer.schedule": "step",
        "optimizer.step_at": (30 / 90, 60 / 90),
        "optimizer.warmup": 0.0,
        "optimizer.weight_decay": 1e-4,
    },
}
MODELS = {"vgg12": "vgg"}  # the others are ResNets


def get_config(mode: str = "digits") -> config_dict.ConfigDict:
    """The experiment of a mode; every value can be overridden: --config.num_workers=8."""
    return make(MODELS.get(mode, "resnet"), BASE, choose(MODES, mode))
