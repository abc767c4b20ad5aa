"""ResIST (arXiv:2107.00961): a pre-activation ResNet, its blocks dealt to the workers.

python -m ist_jax.main --config=configs/resnet.py            scikit-learn's digits, about a minute
python -m ist_jax.main --config=configs/resnet.py:smoke      the same machinery in seconds

Accuracy and time on the digits: see the table in README.md.
"""

from ml_collections import config_dict

MODES = ("digits", "smoke")


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
    config.local_steps = 10  # per round and worker
    config.batch_size = 32  # examples per worker and step
    config.epochs = 40.0  # passes of all workers together over the training set
    config.rounds = config_dict.placeholder(int)  # unset: from epochs
    config.eval_every = 5  # rounds; 0: after the last only
    config.eval_batch_size = 128  # examples; batch statistics are part of the result

    config.data = config_dict.ConfigDict()
    config.data.name = "digits"
    config.data.dir = ""  # embedded sets need none
    config.data.pad = 1  # pixels of padding before the random crop
    config.data.flip = False  # mirror half of the training images

    config.model = config_dict.ConfigDict()
    config.model.name = "resnet"
    config.model.sections = (1, 1, 9, 1)  # blocks; the first of each is shared by all workers
    config.model.width = 16  # channels of section 1, doubled in each

    config.partition = config_dict.ConfigDict()
    config.partition.sections = (3,)  # counted from 1
    config.partition.min_units = 0  # least blocks per worker, reached by overlap; 0: none
    config.partition.shares = ()  # relative speed of each worker; (): equal

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
    return config
