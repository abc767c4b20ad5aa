"""ResIST (arXiv:2107.00961): a pre-activation ResNet, its blocks dealt to the workers.

python -m ist_jax.main --config=configs/resnet.py                 scikit-learn's digits, half a minute
python -m ist_jax.main --config=configs/resnet.py:smoke           the same machinery in seconds
python -m ist_jax.main --config=configs/resnet.py:cifar10_small --config.data.dir=DIR
                                                                  a net and schedule for a CPU
python -m ist_jax.main --config=configs/resnet.py:cifar10 --config.data.dir=DIR
                                                                  the paper's; also cifar100, and svhn
                                                                  by the same numbers
python -m ist_jax.main --config=configs/resnet.py:imagenet --config.data.dir=DIR
                                                                  the paper's; or a folder's, with
                                                                  --config.data.name=image_folder

DIR is tensorflow-datasets' data_dir. On two cores of an AMD EPYC, 2026-11-23: digits 99.17 % in 12.8 s of
rounds, after about 15 s of start, mean of three seeds; cifar10_small 64.1 % (local SGD 66.8) after 48
rounds of 6.6 s (9.6), one seed each, with its ablation in benchmarks/RESULTS.md; all before strided 3x3
convolutions padded one pixel on each side, and to be measured again. The others have not been trained at full
size. The paper's figures for cifar10 / cifar100 with S = 4: 92.35 / 71.30 % (local SGD
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

MODES = ("digits", "smoke", "cifar10_small", "cifar10", "cifar100", "svhn", "imagenet")


def get_config(mode: str = "digits") -> config_dict.ConfigDict:
    """The default experiment of a mode; every value can be overridden: --config.num_workers=8."""
    if mode not in MODES:
        raise ValueError(f"configs/resnet.py has no mode {mode!r}; it has {', '.join(MODES)}")
    config = config_dict.ConfigDict()
    config.method = "ist"  # 'ist' | 'local_sgd' | 'data_parallel'
    config.seed = 0

    config.num_workers = 4
    config.num_devices = 0  # 0: on CPU one virtual device per worker; else as many as fit
    config.workers_on_device = "map"  # 'map': one after another | 'vmap': together
    config.compute_dtype = "float32"  # | 'bfloat16'; parameters, merges and losses stay float32
    config.local_steps = 10  # per round and worker
    config.batch_size = 32  # examples per worker and step
    config.epochs = 40.0  # passes of all workers together over the training set
    config.rounds = config_dict.placeholder(int)  # unset: from epochs
    config.eval_every = 5  # rounds; 0: after the last only
    config.eval_batch_size = 128  # examples; batch statistics are part of the result
    config.patience = 0  # evaluations without a better validation accuracy before a run stops; 0: never

    config.participation = 1.0  # chance of each worker to take part in a round; the others change nothing
    config.max_rounds_left_out = 10  # in a row, of a worker with non-finite values: stops the run; 0: never
    config.lost_after = 60.0  # seconds without a sign of life until a process counts as lost
    config.stuck_after = 1800.0  # seconds without progress, though all processes live; 0: wait for ever

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.every = 10  # rounds; 0: at the end alone
    config.checkpoint.keep = 2  # the latest ones; the best is kept as well

    config.data = config_dict.ConfigDict()
    config.data.name = "digits"
    config.data.dir = ""  # embedded sets need none
    config.data.words = ()  # of Speech Commands; (): all that are there
    config.data.clip_length = "pad"  # of Speech Commands, to 1 s | 'drop': leave other lengths out
    config.data.pad = 1  # pixels of padding before the random crop
    config.data.flip = False  # mirror half of the training images
    config.data.sharing = "all"  # 'all': every worker has the whole set | 'disjoint' | 'skewed'
    config.data.concentration = 0.5  # of 'skewed': Dirichlet; the smaller, the more skewed
    config.data.validation = 0.0  # fraction of the training examples that is held out to stop by

    config.model = config_dict.ConfigDict()
    config.model.name = "resnet"
    config.model.sections = (1, 1, 9, 1)  # blocks; the first of each is shared by all workers
    config.model.width = 16  # channels of section 1, doubled in each
    config.model.block = "basic"  # 'basic' | 'bottleneck': 4 x width channels between blocks
    config.model.stem = "small"  # 'small': 3x3 | 'imagenet': 7x7 and max-pool, both of stride 2

    config.partition = config_dict.ConfigDict()
    config.partition.sections = (3,)  # counted from 1
    config.partition.deal_strided = False  # | True: their strided block is one worker's, others skip it
    config.partition.min_units = 0  # least blocks per worker, reached by overlap; 0: none
    config.partition.shares = ()  # relative speed of each worker; (): equal
    config.partition.warmup_epochs = 0.0  # passes, at the start, in which all train the whole model
    config.partition.scale_at_evaluation = True  # residual branches x the fraction of workers that held them

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"  # 'constant' | 'cosine' | 'step', by examples seen
    config.optimizer.warmup = 0.05  # fraction of all examples, linear from 0
    config.optimizer.step_at = (0.5, 0.75)  # fractions of all examples
    config.optimizer.step_factor = 0.1
    config.optimizer_state = "reset"  # at a round's start: 'reset' | 'carry'

    if mode == "smoke":
        config.model.sections = (1, 3)
        config.model.width = 4
        config.partition.sections = (2,)
        config.num_workers = 2
        config.local_steps = 2
        config.batch_size = 8
        config.rounds = 3
        config.eval_every = 2
        config.checkpoint.every = 1
    elif mode in ("cifar10_small", "cifar10", "cifar100", "svhn"):
        config.data.name = "svhn_cropped" if mode == "svhn" else mode.removesuffix("_small")
        config.data.pad = 4
        config.data.flip = mode != "svhn"  # a mirrored digit is another sign
        config.eval_batch_size = 100
    if mode == "cifar10_small":
        config.partition.min_units = 3  # of 8; without overlap 2
        config.local_steps = 20
        config.batch_size = 64
        config.epochs = 4.9
    elif mode in ("cifar10", "cifar100", "svhn"):
        config.model.sections = (3, 4, 23, 3)
        config.model.width = 64
        config.partition.min_units = 6
        config.local_steps = 50
        config.batch_size = 128
        config.epochs = 160.0
        config.optimizer.learning_rate = 0.03
        config.optimizer.schedule = "step"
        config.optimizer.warmup = 0.0
    elif mode == "imagenet":
        config.data.name = "imagenet2012"  # or 'image_folder': train/<class>/*.JPEG and val/<class>/*.JPEG
        config.data.pad = 0
        config.data.flip = True
        config.data.size = 224  # pixels of the square that the net sees
        config.data.resize = 256  # evaluation: of the shorter side, before the centre is cut out
        config.data.crop_area = (0.08, 1.0)  # training: of a random crop, as a fraction of the image
        config.data.crop_aspect = (3 / 4, 4 / 3)  # width / height of a random crop
        config.data.mean = (123.675, 116.28, 103.53)  # per channel, 0 to 255
        config.data.std = (58.395, 57.12, 57.375)
        config.data.processes = 8  # that read and decode; 0: a thread of the program itself does
        config.model.sections = (3, 4, 23, 3)
        config.model.width = 64
        config.model.block = "bottleneck"
        config.model.stem = "imagenet"
        config.partition.min_units = 10
        config.partition.warmup_epochs = 5.0  # the paper has "a few"
        config.local_steps = 15
        config.batch_size = 256
        config.epochs = 90.0
        config.eval_every = 167  # rounds: two epochs
        config.checkpoint.every = 167  # with each evaluation, so that the best one is kept
        config.eval_batch_size = 250
        config.optimizer.learning_rate = 0.1
        config.optimizer.schedule = "step"
        config.optimizer.step_at = (30 / 90, 60 / 90)
        config.optimizer.warmup = 0.0
        config.optimizer.weight_decay = 1e-4  # not in the paper; usual for this net
    return config
