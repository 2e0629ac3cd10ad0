"""Makes weights_*.pth and weights_expected.npz: run with torch and openunmix 1.3.0 in this folder."""

import importlib.machinery
import sys
import types

import numpy as np
import torch

for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):  # imported by openunmix, not used here
    sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
from openunmix.model import OpenUnmix  # noqa: E402

torch.manual_seed(0)
net = OpenUnmix(nb_bins=17, nb_channels=2, hidden_size=4, nb_layers=2, max_bin=11)
optimizer = torch.optim.Adam(net.parameters())
net(torch.rand(2, 2, 17, 3)).sum().backward()
optimizer.step()
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
rest = {"epoch": 2, "best_loss": 0.5, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}

state = net.state_dict()
for value in state.values():
    value.copy_(torch.randn(value.shape) * 0.5 + 1 if value.is_floating_point() else torch.tensor(7))
torch.save(state, "weights_zip.pth")
torch.save(state, "weights_legacy.pth", _use_new_zipfile_serialization=False)

# the same, with everything that a tensor can be: types, offsets, strides, shared storages, Parameters, old buffers
odd = dict(state)
odd["fc1.weight"] = state["fc1.weight"].T.contiguous().T
odd["fc2.weight"] = state["fc2.weight"].double()
pool = torch.cat([torch.zeros(3), state["output_mean"], state["output_scale"]])
odd["output_mean"], odd["output_scale"] = pool[3:20], pool[20:]
odd["input_scale"] = torch.ones(1).expand(11)
odd["bn1.weight"] = torch.nn.Parameter(state["bn1.weight"])
odd["bn2.weight"], odd["bn2.bias"] = state["bn2.weight"].half(), state["bn2.bias"].bfloat16()
odd["bn3.weight"] = torch.stack([state["bn3.weight"], state["bn3.bias"]], 1)[:, 0]
odd["sample_rate"] = torch.tensor(44100)
odd["stft.window"] = odd["transform.0.window"] = torch.hann_window(32)
torch.save({**rest, "state_dict": odd}, "weights_odd.chkpnt")
torch.save({**rest, "state_dict": odd}, "weights_odd_legacy.chkpnt", _use_new_zipfile_serialization=False)

expected = {f"plain/{name}": value.numpy() for name, value in state.items()}
changed = ("input_scale", "bn2.weight", "bn2.bias")
expected.update({f"odd/{name}": odd[name].float().numpy() for name in changed})
np.savez_compressed("weights_expected.npz", **expected)
