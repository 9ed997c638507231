"""The folder kernels/, under a name that an installed fastdiff has too; the rest of fastdiff imports it from here.

A wheel puts the folder itself in this file's place (see pyproject.toml): `kernels` is also the name of another package
on PyPI, which an installed fastdiff must not hide. kernels/README.md says more.
"""

from pathlib import Path

import kernels
from fastdiff.errors import UserError
from kernels import *  # noqa: F403

_OURS = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
if Path(kernels.__file__ or "").resolve() != _OURS:
    raise UserError(
        f"`import kernels` finds {kernels.__file__}, but fastdiff needs {_OURS}. Run from the repository, or run "
        "`pip install .` there, without -e."
    )
