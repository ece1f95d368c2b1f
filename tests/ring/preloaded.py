"""What the process has imported of which ranks are forked: all that a rank with a small llama imports.

Only multiprocessing's fork server imports this (see :mod:`tests.ring.processes`). It ends with the process that started it,
however that ends, and its ranks with it.
"""

import importlib
import os

import tests.ring.processes  # noqa: F401  (where a forked rank begins)
from kvplane_runtime.ring.process import end_with

end_with(os.getppid())
importlib.import_module("transformers.models.llama.modeling_llama")  # else imported when the model is loaded
