"""What compiled graphs take as constants: of `families`, what asks the device or torch's settings,
which a compiler cannot trace.

Only for what a compiler traces: to mark a function imports the whole compiler, a second.
"""

import torch

from . import families

has_kernels = torch.compiler.assume_constant_result(families.has_kernels)
allows_tf32 = torch.compiler.assume_constant_result(families.allows_tf32)
allows_split = torch.compiler.assume_constant_result(families.allows_split)
