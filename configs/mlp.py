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
others it holds train.txt and test.txt (or *_train.txt and *_test.txt). Two cores of an AMD EPYC, 4
workers, mean of three seeds, 2026-11-23: digits 98.80 % in 1.6 s of rounds, after about 8 s of start;
delicious P@1 65.16 % in 1.1 s. speech2 on ten words (1,138 clips, 80 epochs, 2 workers, 2026-11-22):
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

MODES = ("digits", "smoke", "speech2", "speech3", "delicious", "amazon670k")


def get_config(mode: str = "digits") -> config_dict.ConfigDict:
    """The default experiment of a mode; every value can be overridden: --config.num_workers=8."""
    if mode not in MODES:
        raise ValueError(f"configs/mlp.py has no mode {mode!r}; it has {', '.join(MODES)}")
    config = config_dict.ConfigDict()
    config.method = "ist"  # 'ist' | 'local_sgd' | 'data_parallel'
    config.seed = 0

    config.num_workers = 4
    config.num_devices = 0  # 0: on CPU one virtual device per worker; else as many as fit
    config.workers_on_device = "map"  # 'map': one after another | 'vmap': together
    config.compute_dtype = "float32"  # | 'bfloat16'; parameters, merges and losses stay float32
    config.local_steps = 50  # per round and worker
    config.batch_size = 64  # examples per worker and step
    config.epochs = 400.0  # passes of all workers together over the training set
    config.rounds = config_dict.placeholder(int)  # unset: from epochs
    config.eval_every = 5  # rounds; 0: after the last only
    config.eval_batch_size = 128  # examples; batch statistics are part of the result
    config.patience = 0  # evaluations without a better validation accuracy before a run stops; 0: never

    config.participation = 1.0  # chance of each worker to take part in a round; the others change nothing
    config.max_rounds_left_out = 10  # in a row, of a worker with non-finite values: stops the run; 0: never
    config.lost_after = 60.0  # seconds without a sign of life until a process counts as lost
    config.stuck_after = 1800.0  # seconds without progress, though all processes live; 0: wait for ever

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.every = 50  # rounds; 0: at the end alone
    config.checkpoint.keep = 2  # the latest ones; the best is kept as well

    config.data = config_dict.ConfigDict()
    config.data.name = "digits"
    config.data.dir = ""  # embedded sets need none
    config.data.words = ()  # of Speech Commands; (): all that are there
    config.data.clip_length = "pad"  # of Speech Commands, to 1 s | 'drop': leave other lengths out
    config.data.pad = 0  # pixels of padding before the random crop
    config.data.flip = False  # mirror half of the training images
    config.data.sharing = "all"  # 'all': every worker has the whole set | 'disjoint' | 'skewed'
    config.data.concentration = 0.5  # of 'skewed': Dirichlet; the smaller, the more skewed
    config.data.validation = 0.0  # fraction of the training examples that is held out to stop by

    config.model = config_dict.ConfigDict()
    config.model.name = "mlp"
    config.model.hidden = (1024, 1024)  # neurons of each hidden layer
    config.model.output_norm = True  # BatchNorm on the logits, as in the paper's speech nets

    config.partition = config_dict.ConfigDict()
    config.partition.min_units = 0  # least neurons per worker and layer, by overlap; 0: none
    config.partition.shares = ()  # relative speed of each worker; (): equal
    config.partition.warmup_epochs = 0.0  # passes, at the start, in which all train the whole model
    config.partition.scale_at_evaluation = True  # logits, without output_norm, x 1/S

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "constant"  # 'constant' | 'cosine' | 'step', by examples seen
    config.optimizer.warmup = 0.0  # fraction of all examples, linear from 0
    config.optimizer.step_at = (0.5, 0.75)  # fractions of all examples
    config.optimizer.step_factor = 0.1
    config.optimizer_state = "reset"  # at a round's start: 'reset' | 'carry'

    if mode == "smoke":
        config.model.hidden = (32, 32)
        config.num_workers = 2
        config.local_steps = 2
        config.batch_size = 8
        config.rounds = 3
        config.eval_every = 2
        config.checkpoint.every = 1
    elif mode in ("speech2", "speech3"):
        config.data.name = "speech_commands"
        config.data.clip_length = "drop"
        config.model.hidden = (4096,) if mode == "speech2" else (8192, 8192)
        config.num_workers = 2
        config.local_steps = 20 if mode == "speech2" else 30
        config.batch_size = 128
        config.epochs = 100.0
        config.optimizer.learning_rate = 0.01
        config.optimizer.momentum = 0.0
    elif mode in ("delicious", "amazon670k"):
        config.data.name = mode  # 'extreme_classification' for another set in this format
        config.model.output_norm = False  # it makes every label equally likely
        config.model.hidden = (1024,)
        config.local_steps = 20
        config.batch_size = 32
        config.epochs = 5.0
        config.optimizer.learning_rate = 0.1
        config.optimizer.schedule = "cosine"
    if mode == "amazon670k":
        config.model.hidden = (2560,)
        config.num_workers = 8
        config.batch_size = 128
        config.epochs = 50.0  # at most; stopped by the validation split
        config.eval_every = 24  # about once in a pass
        config.patience = 3
        config.data.validation = 0.02
        config.checkpoint.every = 240  # 8 GB each
        config.optimizer.schedule = "constant"
    return config
