"""Names of modules and tensors, both ways."""

import torch
from torch import nn

from secateur.compat.torchao import fqn_to_module, get_arg_info_from_tensor_fqn, module_to_fqn
from tests.models import Decoder


def test_every_module_is_found_by_its_name_and_has_it() -> None:
    model = Decoder()
    for name, module in model.named_modules():
        assert module_to_fqn(model, module) == name
        assert fqn_to_module(model, name) is module
    assert module_to_fqn(model, nn.Linear(1, 1)) is None
    assert module_to_fqn(model, model.embed, prefix="a") == "a.embed"


def test_a_path_leads_to_a_tensor_or_nowhere() -> None:
    model = Decoder()
    assert fqn_to_module(model, "blocks.1.up_proj.weight") is model.blocks[1].up_proj.weight
    for path in ("blocks.7", "blocks.1.nothing.weight", "blocks.1.up_proj.in_features"):
        assert fqn_to_module(model, path) is None


def test_a_tensors_name_in_its_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert get_arg_info_from_tensor_fqn(model, "0.weight") == {
        "module_fqn": "0",
        "module": model[0],
        "tensor_name": "weight",
        "tensor_fqn": "0.weight",
    }
    assert get_arg_info_from_tensor_fqn(model, ".0.weight")["tensor_fqn"] == "0.weight"
    assert get_arg_info_from_tensor_fqn(model[0], "weight")["module"] is model[0]
    assert get_arg_info_from_tensor_fqn(model[0], "weight")["module_fqn"] == ""


def test_an_unknown_module_is_none_beside_its_parts() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.ones(1))
    for fqn, module_fqn in (("seq.0.weight", "seq.0"), ("a.weight", "a")):
        info = get_arg_info_from_tensor_fqn(model, fqn)
        assert info["module"] is None
        assert (info["module_fqn"], info["tensor_name"]) == (module_fqn, "weight")
