"""Triton's interpreter made to work with this numpy, for kernels on a machine without a GPU.

`tests/conftest.py` turns the interpreter on; this mends it.
"""

import torch


def mend() -> bool:
    """Before the first launch. Returns whether there is a GPU, so that nothing is interpreted."""
    if torch.cuda.is_available():
        return True
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        """Loop bounds are arrays of one element there, which numpy 2.4 no longer turns into ints."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index_too
    return False
