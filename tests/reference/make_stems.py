"""Makes tests/data/golden_stems_*.npz, for tests/test_separate.py, with the reference: openunmix 1.3.0's Separator.

    python make_stems.py OUT_DIR [--live]

Runs in the environment of make_cases.py. Golden files hold small models, and what the reference means: it computes
in double precision. With --live, models and songs of realistic size, and what it gives: in single precision.

A file holds separator.json and the states of the models, a mixture, and stems for many options, every STRIDE-th
sample of them: STRIDE and the hop have no common divisor, so that each position within a hop is there.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from make_cases import RATE, make_used, music
from openunmix import model, utils

STRIDE = 17

# Per model: targets; channels, unidirectional, cropped; n_fft, n_hop, hidden_size, nb_timesteps, golden and live
MODELS = {
    "stereo": (("vocals", "drums", "bass", "other"), (2, False, True), (256, 64, 8, 3001), (4096, 1024, 64, 441001)),
    "mono": (("speech", "noise"), (1, False, False), (256, 128, 8, 3001), (1024, 512, 32, 160001)),
    "unidirectional": (("vocals", "bass"), (2, True, False), (512, 128, 6, 3001), (2048, 512, 32, 220501)),
}


def variants(name, targets, live):
    """What the Separator is asked for: keyword arguments of ours; `channels` and `whole` choose the audio."""
    window, others = (300, (100, None)) if live else (20, (7, 300, None))
    base = {"niter": 1, "softmask": False, "residual": False, "wiener_win_len": window, "targets": targets}
    base.update(channels=2, whole=True)
    for niter, softmask in itertools.product((0, 1, 2), (False, True)):
        yield {**base, "niter": niter, "softmask": softmask}
        if name == "mono":
            yield {**base, "niter": niter, "softmask": softmask, "channels": 1}
    if name == "stereo":
        for length in others:
            yield {**base, "wiener_win_len": length}
        yield {**base, "targets": targets[2::-2]}
        yield {**base, "targets": targets[1:2], "niter": 0}
        yield {**base, "residual": True, "softmask": True}
        # The reference's atan2 turns bins of the mixture that are exactly zero into ones, which its residual
        # then has. So these are compared before the silence only.
        yield from ({**base, "residual": True, "whole": False, "niter": niter} for niter in (0, 1, 2))
        yield {**base, "residual": True, "whole": False, "targets": targets[:1]}


def make_models(targets, nb_channels, unidirectional, cropped, n_fft, n_hop, hidden_size, generator):
    """{target: OpenUnmix} with weights that half precision holds, and separator.json."""
    config = {"nfft": n_fft, "nhop": n_hop, "sample_rate": RATE, "nb_channels": nb_channels}
    max_bin = int(utils.bandwidth_to_max_bin(RATE, n_fft, 16000)) if cropped else None
    models = {}
    for target in targets:
        network = model.OpenUnmix(
            n_fft // 2 + 1, nb_channels, hidden_size, unidirectional=unidirectional, max_bin=max_bin
        )
        make_used(network, generator)
        with torch.no_grad():
            network.input_mean -= 0.5
            network.input_scale /= 2
            for tensor in network.state_dict().values():
                tensor.copy_(tensor.half())
        models[target] = network.eval()
    return models, config


def separated(models, config, audio, dtype, options):
    """Stems (nb_sources, nb_channels, nb_timesteps)."""
    separator = model.Separator(
        {target: models[target] for target in options["targets"]},
        **{key: options[key] for key in ("niter", "softmask", "residual", "wiener_win_len")},
        sample_rate=config["sample_rate"],
        n_fft=config["nfft"],
        n_hop=config["nhop"],
        nb_channels=config["nb_channels"],
    )
    separator.freeze()
    stems = separator.to(dtype)(torch.from_numpy(audio[None]).to(dtype))[0].numpy().astype(np.float32)
    for network in models.values():
        network.float()
    return stems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--live", action="store_true", help="models and songs of realistic size")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for seed, (name, (targets, kind, golden_sizes, live_sizes)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        *sizes, nb_timesteps = live_sizes if args.live else golden_sizes
        models, config = make_models(targets, *kind, *sizes, torch.Generator().manual_seed(seed))
        mixture = music(np.random.default_rng(seed), nb_timesteps)[0][0]
        silence = slice(nb_timesteps * 6 // 10, nb_timesteps * 8 // 10)
        mixture[:, silence] = 0
        content = {
            "config": json.dumps(config),
            "stride": STRIDE,
            "mixture": np.round(mixture * 32768).astype(np.int16),
            "end": silence.start,
        }
        for target, network in models.items():
            for key, tensor in network.state_dict().items():
                content[f"{target}/{key}"] = tensor.half().numpy() if tensor.ndim else tensor.numpy()
        for options in variants(name, targets, args.live):
            audio = mixture[: options["channels"], : None if options["whole"] else silence.start]
            stems = separated(models, config, audio, torch.float32 if args.live else torch.float64, options)
            if not args.live:
                single = separated(models, config, audio, torch.float32, options)
                print(f"{name} {options}: its single precision differs by {np.abs(stems - single).max():.1e}")
            content[f"stems/{json.dumps(options)}"] = stems[..., ::STRIDE]
        np.savez_compressed(args.out_dir / f"{'' if args.live else 'golden_'}stems_{name}.npz", **content)


if __name__ == "__main__":
    main()
