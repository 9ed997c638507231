import shutil
import subprocess
import sys

from kernels.caching import source_hash

PROGRAM = """
import torch
from torch._dynamo.utils import counters
from kernels import group_norm_silu

x = torch.linspace(-2, 3, 128).reshape(1, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
run = torch.compile(lambda x: group_norm_silu(x, torch.ones(8), torch.zeros(8), 2))
y = run(x)
(gradient,) = torch.autograd.grad(y.square().sum(), x)
print(y.abs().sum().item(), gradient.abs().sum().item(), counters["aot_autograd"]["autograd_cache_hit"])
"""
FORWARD = "y = z * torch.sigmoid(z) if silu else z"


def test_compiled_operators_follow_their_code(repo, tmp_path, monkeypatch, compiled):
    """A second process takes what the first has compiled, but not once a formula has changed."""
    code = tmp_path / "kernels"
    shutil.copytree(repo / "kernels", code)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def run():
        done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
        y, gradient, hits = done.stdout.split()
        return float(y), float(gradient), int(hits)

    y, gradient, hits = run()
    assert hits == 0
    assert run() == (y, gradient, 1)
    file = code / "group_norm_launch.py"
    text = file.read_text()
    assert text.count(FORWARD) == 1
    file.write_text(text.replace(FORWARD, f"{FORWARD}\n    y = 2 * y"))
    doubled, _, hits = run()
    assert (doubled, hits) == (2 * y, 0)
    file.write_text(text)
    assert run() == (y, gradient, 1)


def test_the_hash_is_of_names_and_contents(tmp_path):
    def now():
        return source_hash(tmp_path, ["c.txt", "folder"])

    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.py", "b.txt", "../c.txt"):
        (folder / name).write_text("x")
    first = now()
    (folder / "b.txt").write_text("y")  # no Python
    assert now() == first
    (folder / "a.py").rename(folder / "b.py")
    second = now()
    (tmp_path / "c.txt").write_text("y")
    assert len({first, second, now()}) == 3
