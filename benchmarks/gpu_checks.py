"""The stages of gpu.py that compare: a GPU, or in a rehearsal the plain forms, with the fast forms of the CPU."""

import importlib
import math
import subprocess

import nnabla as nn
import nnabla.functions as F
import numpy as np
import work
from gpu_work import check, fact, main
from nnabla_side import make_model
from report import machine

import functions
import losses
import utils
from solvers import Adam
from train import seed_nnabla

# Relative to the largest value of each tensor, but for parameters: those of the tests against torch.
OUTPUT, GRADIENT, STATISTICS, LOSS, PARAMETERS = 1e-5, 2e-5, 1e-4, 1e-6, 5e-5
# Shares of elements that rounding may decide. Of two million inputs of the hidden ReLU, one is 0 but for rounding, and
# the gradients of its unit are with it or without. Adam makes a full step of any gradient, and so of a few that are
# nothing but rounding; what comes of them grows in the steps that follow.
KINKS, STEPS = 1e-2, 5e-2
# Of the last ReLU there are ten times as many: where the decoder's end is raised so far, it keeps what it gets.
OUTPUT_MEAN = 4.0


def worst(actual, expected, share=0.0, relative=True):
    """The largest difference over dicts of arrays, and its name, but for a share of the elements of each array.

    It is relative to the largest value expected in the array, or absolute.
    """
    errors = {}
    for name, array in expected.items():
        difference = np.sort(np.abs(actual[name] - array), axis=None)  # NaN come last
        error, unit = float(difference[difference.size - 1 - int(share * difference.size)]), np.abs(array).max()
        errors[name] = error / float(unit) if relative and unit else error
        errors[name] = math.inf if math.isnan(errors[name]) else errors[name]
    name = max(errors, key=errors.get)
    return errors[name], name


def both(sides, run):
    """What `run` returns, on the side that is tested and on that of the reference."""
    with sides.reference():
        expected = run()
    with sides.tested():
        return run(), expected


def compare(what, actual, expected, tolerance, **options):
    """Check dicts of arrays, if there are any; the row names the worst of several. Options are those of `worst`."""
    if expected:
        difference, name = worst(actual, expected, **options)
        check(f"{what} ({name})" if len(expected) > 1 else what, difference, tolerance)


# ------------------------------------------------------------------------------------------- device


def device(sides):
    """What it is, and whether it multiplies in single precision."""
    if sides.name == "cudnn":
        cuda = importlib.import_module("nnabla_ext.cuda")
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
        try:
            fact("GPU, driver, memory", subprocess.run(query, capture_output=True, text=True).stdout.strip())
        except OSError as error:
            fact("nvidia-smi", error)
        fact("CUDA, cuDNN of the extension", f"{cuda.__cuda_version__}, {cuda.__cudnn_version__}")
        fact("TF32", "allowed" if cuda.is_tf32_enabled() else "not allowed")
    fact("context", f"{', '.join(sides.device.backend)}; {sides.device.array_class}")
    fact("versions", ", ".join(f"{name} {version}" for name, version in utils.run_metadata()["versions"].items()))
    for line in machine().splitlines():
        fact("machine", line.removeprefix("- "))
    a, b = (np.random.default_rng(seed).standard_normal((512, 512), np.float32) for seed in (1, 2))
    with sides.tested():
        product = F.affine(*map(nn.Variable.from_numpy_array, (a, b)))
        product.forward()
        exact = a.astype(np.float64) @ b
        check("a product of matrices, against float64", worst({"": product.d}, {"": exact})[0], 1e-6)


# ------------------------------------------------------------------------------------ graph functions


def of_network(sizes):
    """{what: (function of variables, their arrays, names of those without a gradient)}, as the recipe calls them."""
    T, N, C, H, n_fft = sizes.nb_frames, sizes.nb_samples, 2, sizes.hidden_size, sizes.n_fft
    bins, n_hop = n_fft // 2 + 1, n_fft // 4
    max_bin = 3 * bins // 4
    rng = np.random.default_rng(0)

    def noise(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def magnitude(n):
        return np.hypot(noise(T, n, C, bins), noise(T, n, C, bins))

    def per_bin(n, scale):
        return {"mean": noise(n, scale=scale), "scale": 1 + np.abs(noise(n))}

    def off_zero(*shape):
        """Noise that a ReLU behind a normalisation leaves as it is, or not, whatever the rounding."""
        x = noise(*shape)
        return x + np.copysign(1, x)

    x, length = magnitude(N), (T - 1) * n_hop + n_fft
    audio, few = noise(N, C, length, scale=0.1), clicks(rng, (2, C, length), n_fft)

    def spectrogram(**options):
        return lambda x: functions.spectrogram(x, n_fft, n_hop, **options)

    def lstm(bidirectional):
        size = H // 2 if bidirectional else H
        return lambda x: functions.lstm(x, size, 3, bidirectional, 0.0, False, name="lstm")

    return {
        "spectrogram": (spectrogram(), {"x": audio}, ["x"]),
        "spectrogram, centred, mono, power 2": (spectrogram(center=True, mono=True, power=2), {"x": audio}, ["x"]),
        "spectrogram, with a gradient": (spectrogram(), {"x": few}, []),
        "input_affine": (
            lambda x, mean, scale: functions.input_affine(x, H, mean, scale, name="fc1"),
            {"x": x, **per_bin(max_bin, 1)},
            ["x"],
        ),
        "batch_normalization, tanh": (
            lambda x: functions.batch_normalization(x, F.tanh, False, name="fc1"), {"x": noise(T, N, H)}, []
        ),
        "batch_normalization, ReLU": (
            lambda x: functions.batch_normalization(x, F.relu, False, name="fc2"), {"x": off_zero(T, N, H)}, []
        ),
        "lstm": (lstm(True), {"x": noise(T, N, H)}, []),
        "lstm, unidirectional": (lstm(False), {"x": noise(T, N, H)}, []),
        "affine": (
            lambda x, y: functions.affine([x, y], H, name="fc2"), {"x": noise(T, N, H), "y": noise(T, N, H)}, []
        ),
        "mask": (
            lambda z, scale, mean, x: functions.mask(z, scale, mean, x, False, name="fc3"),
            {"z": off_zero(T, N, C * bins), **per_bin(bins, 0.02), "x": x},
            ["x"],
        ),
        "squared_error": (functions.squared_error, {"y_hat": magnitude(N), "y": x}, ["y"]),
        "absolute_error": (functions.absolute_error, {"y_hat": magnitude(N), "y": x}, ["y"]),
    }  # fmt: skip


def clicks(rng, shape, n_fft):
    """Audio of which every frame, at hops of a quarter, has one click: no bin is near 0, where phases are rounding."""
    audio = 2e-4 * rng.standard_normal(shape)
    places = slice(n_fft // 8, None, n_fft)
    audio[..., places] = rng.uniform(0.5, 1, audio[..., places].shape)
    return audio.astype(np.float32)


def of_waveforms(sizes):
    """The same, of what joint losses and the library use besides, last those that need cuDNN's convolutions."""
    T, C, n_fft, n_targets = sizes.nb_frames, 2, sizes.n_fft, 2
    bins, n_hop, N = n_fft // 2 + 1, n_fft // 4, min(sizes.nb_samples, 2)
    length = (T - 1) * n_hop + n_fft
    rng = np.random.default_rng(0)

    def noise(*shape, scale=0.1):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    y = {f"y{k}": noise(N, C, length) for k in range(n_targets)}
    y_hat = {f"y_hat{k}": y[f"y{k}"] + noise(N, C, length, scale=0.05) for k in range(n_targets)}
    Y = {f"Y{k}": np.hypot(noise(T, N, C, bins), noise(T, N, C, bins)) for k in range(n_targets)}
    x, sets = sum(y.values()), losses.sets_of(n_targets)

    def weighted_sdr(x, **signals):
        return losses.weighted_sdr(x, [signals[k] for k in y_hat], [signals[k] for k in y], sets)

    def waveforms(x, **magnitudes):
        return functions.waveforms(list(magnitudes.values()), x, n_fft, n_hop)

    return {
        "magnitude": (
            lambda real, imag: functions.magnitude(real, imag, 1, False),
            {"real": noise(N, C, bins, T), "imag": noise(N, C, bins, T)},
            [],
        ),
        "negative_sdr": (losses.negative_sdr, {"y_hat": y_hat["y_hat0"], "y": y["y0"]}, ["y"]),
        "weighted_sdr": (weighted_sdr, {"x": x, **y_hat, **y}, ["x", *y]),
        "stft": (lambda x: functions.stft(x, n_fft, n_hop, False), {"x": x}, []),
        "waveforms": (waveforms, {"x": clicks(rng, x.shape, n_fft), **Y}, ["x"]),
    }


def run_function(function, arrays, fixed):
    """Output, gradients and running statistics of a graph function, of the same parameters on every side."""
    nn.clear_parameters()
    seed_nnabla("initial weights", seed=0)
    inputs = {name: nn.Variable.from_numpy_array(array) for name, array in arrays.items()}
    for name, variable in inputs.items():
        variable.need_grad = name not in fixed
    y = function(**inputs)
    y = F.concatenate(*y, axis=y[0].ndim - 1) if isinstance(y, (list, tuple)) else y
    parameters, rng = nn.get_parameters(grad_only=False), np.random.default_rng(1)
    for name in sorted(parameters):  # others than the zeros and ones that some begin with
        factors = 1 + 0.3 * rng.uniform(-1, 1, parameters[name].shape)
        parameters[name].d = parameters[name].d * factors + (0.05 * rng.standard_normal() if "bn/beta" in name else 0)
    learnt = {name: v for name, v in {**inputs, **parameters}.items() if v.need_grad}
    for variable in learnt.values():
        variable.grad.zero()
    y.forward(clear_no_need_grad=True)
    result = {"loss" if y.shape == () else "output": {"": y.d.copy()}}
    if learnt:
        y.backward(rng.standard_normal(y.shape).astype(np.float32), clear_buffer=True)
        result["gradients"] = {name: variable.g.copy() for name, variable in learnt.items()}
    result["statistics"] = {name: v.d.copy() for name, v in parameters.items() if not v.need_grad}
    return result


def compare_functions(sides, cases, loss):
    tolerances = {"output": OUTPUT, "loss": loss, "gradients": GRADIENT, "statistics": STATISTICS}
    for what, case in cases(sides.sizes).items():
        actual, expected = both(sides, lambda case=case: run_function(*case))
        for kind, tolerance in tolerances.items():
            compare(f"{what}: {kind}", actual.get(kind), expected.get(kind), tolerance)


def run_adam(nb_steps=3):
    """Parameters after steps along given gradients, of all sizes."""
    rng = np.random.default_rng(0)
    parameters = {name: nn.Variable.from_numpy_array(rng.standard_normal((64, 1024), np.float32)) for name in "ab"}
    solver = Adam(parameters, work.LR, work.WEIGHT_DECAY)
    for _ in range(nb_steps):
        for variable in parameters.values():
            sizes = 10 ** rng.uniform(-10, 1, variable.shape)
            variable.g = (sizes * rng.standard_normal(variable.shape)).astype(np.float32)
        solver.update()
    return {name: variable.d.copy() for name, variable in parameters.items()}


def recipe(sides):
    """What a step is made of."""
    compare_functions(sides, of_network, LOSS)
    compare("Adam: parameters after three steps", *both(sides, run_adam), PARAMETERS, relative=False)


# --------------------------------------------------------------------------------------- whole network


def signals_of(nb_samples, seconds, targets):
    """Mixtures, and targets that are parts of them, {target: (nb_samples, 2, nb_timesteps)}."""
    y = {target: work.audio(nb_samples, seconds, seed) for seed, target in enumerate(targets, 1)}
    return sum(y.values()) + work.audio(nb_samples, seconds, 0), y


def run_network(targets, options, nb_samples, seconds):
    """The first step's loss, estimates, gradients and running statistics; parameters after three steps of Adam."""
    seed_nnabla("initial weights", seed=0)
    model = make_model(targets, dropout=0.0, **options)
    for name, variable in model.variables().items():
        if name.startswith("output_mean"):
            variable.d = OUTPUT_MEAN
    arrays, y = signals_of(nb_samples, seconds, targets)
    x = nn.Variable.from_numpy_array(arrays)
    signals = losses.Signals(model, x, {name: nn.Variable.from_numpy_array(array) for name, array in y.items()})
    loss = losses.mse(signals)
    for estimate in signals.Y_hat.values():
        estimate.persistent = True
    solver = Adam(model.variables(), work.LR, work.WEIGHT_DECAY)
    for step in range(3):
        solver.zero_grad()
        loss.forward(clear_no_need_grad=True)
        loss.backward(clear_buffer=True)
        gradients = {name: variable.g.copy() for name, variable in model.variables().items()}
        if step == 0:
            result = {"loss": {"": np.array(loss.d)}, "gradients": gradients}
            result["output"] = {name: estimate.d.copy() for name, estimate in signals.Y_hat.items()}
            values = model.get_parameters()
            result["statistics"] = {name: v for name, v in values.items() if name.endswith(("bn/mean", "bn/var"))}
        for name, variable in model.variables().items():
            if name.startswith("input_mean"):  # the true gradient is zero, rounding would become full steps
                gradients.pop(name)
                variable.grad.zero()
        solver.update()
    result["parameters"] = {name: variable.d.copy() for name, variable in model.variables().items()}
    return result


def network(sides):
    """The whole of it, dropout off; and that of four targets with bridges."""
    sizes = sides.sizes
    for name, targets, options, nb_samples in (
        ("OpenUnmix", work.TARGETS[:1], {}, sizes.nb_samples),
        ("JointOpenUnmix", work.TARGETS, {"crossing": True}, sizes.joint_samples),
    ):
        case = (targets, options, nb_samples, sizes.seconds)
        actual, expected = both(sides, lambda case=case: run_network(*case))
        for kind, of, tolerance, shares in (
            ("estimates", "output", OUTPUT, {}),
            ("loss", "loss", LOSS, {}),
            ("gradients, 99 % of each", "gradients", GRADIENT, {"share": KINKS}),
            ("gradients, the others", "gradients", 1e-2, {}),
            ("running statistics", "statistics", STATISTICS, {}),
            ("parameters after three steps of Adam, 95 % of each", "parameters", PARAMETERS, {"share": STEPS}),
            ("the others, at most three steps both ways", "parameters", 6 * work.LR, {}),
        ):
            relative = of != "parameters"
            what = f"{name}, batch {nb_samples}: {kind}"
            compare(what, actual[of], expected[of], tolerance, **shares, relative=relative)


# ------------------------------------------------------------------------------------------- repeats


def repeats(sides):
    """Whether the same seed gives the same numbers, with dropout."""
    sizes = sides.sizes

    def train(nb_steps, seed):
        """Losses, and parameters at the end."""
        seed_nnabla("initial weights", seed=0)
        model = make_model(work.TARGETS[:1])
        x, y = signals_of(sizes.nb_samples, sizes.seconds, work.TARGETS[:1])
        x, y = nn.Variable.from_numpy_array(x), {name: nn.Variable.from_numpy_array(a) for name, a in y.items()}
        loss, found = losses.mse(losses.Signals(model, x, y)), []
        solver = Adam(model.variables(), work.LR, work.WEIGHT_DECAY)
        for step in range(nb_steps):
            seed_nnabla("dropout", seed=seed, epoch=1, step=step)
            solver.zero_grad()
            loss.forward(clear_no_need_grad=True)
            loss.backward(clear_buffer=True)
            solver.update()
            found.append(float(loss.d))
        return np.array(found), model.get_parameters()

    with sides.tested():
        first, again, other = (train(1, seed)[0] for seed in (1, 1, 2))
        check("dropout, loss of the same seed again", abs(again / first - 1)[0], LOSS)
        check("dropout, loss of another seed is another (0: it is)", first[0] == other[0], 0)
        nb_steps = 20 if sides.name == "cudnn" else 3
        (losses_a, a), (losses_b, b) = (train(nb_steps, 1) for _ in range(2))
    for what, one, two in (("losses", {"": losses_a}, {"": losses_b}), ("parameters", a, b)):
        equal = all(np.array_equal(one[name], two[name]) for name in one)
        said = "bit for bit equal" if equal else f"differ by {worst(one, two)[0]:.1e} of the largest"
        fact(f"{nb_steps} steps twice, {what}", said)


if __name__ == "__main__":
    main(
        {
            "device": device,
            "functions": recipe,
            "waveforms": lambda sides: compare_functions(sides, of_waveforms, OUTPUT),
            "network": network,
            "repeats": repeats,
        }
    )
