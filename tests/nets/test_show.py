"""The table of a network, and the command that prints it."""

import re

import pytest
import torch

from fastdiff.cli import main
from fastdiff.nets.fuse import fuse
from fastdiff.nets.graph import program
from fastdiff.nets.show import table
from fastdiff.nets.unet import UNet, UNetConfig
from fastdiff.presets import PRESETS


def test_the_parts_of_the_cifar10_network_add_up():
    lines = table(UNet(UNetConfig()), x=torch.empty(1, 3, 32, 32), t=torch.empty(1)).splitlines()
    rows = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines[1:]}
    assert rows["conv_in"] == ["32", "128", "3,584", f"{2 * 32 * 32 * 128 * 27 / 1e9:.3f}"]
    assert rows["down.0"][0] == "32 -> 16"
    *parts, total = [[float(cell.replace(",", "")) for cell in row[-2:]] for row in rows.values()]
    assert total[0] == 35_746_307 == sum(row[0] for row in parts)
    assert total[1] == pytest.approx(sum(row[1] for row in parts), abs=0.01)


@pytest.mark.lab
def test_the_command_prints_the_table_or_the_fused_program(capsys):
    assert main(["show"]) == 0
    assert "35,746,307" in capsys.readouterr().out
    assert main(["show", "--preset", "quick", "--code"]) == 0
    code = capsys.readouterr().out
    assert "group_norm_silu(" in code
    assert code == program(fuse(UNet(PRESETS["quick"].net)))
    assert main(["show", "--preset", "text-digits"]) == 0
    shown = capsys.readouterr().out  # with its encoder of words
    assert re.search(r"^text +64 +545,\d+ ", shown, re.MULTILINE)
    assert "1,987,852" in shown
    assert main(["show", "--preset", "flow-map-cifar10"]) == 0
    assert re.search(r"^span ", capsys.readouterr().out, re.MULTILINE)
    assert main(["show", "--preset", "autoencoder"]) == 0
    sums = re.findall(r"^sum +([\d,]+)", capsys.readouterr().out, re.MULTILINE)
    assert sum(int(each.replace(",", "")) for each in sums) == 3_346_471
