"""Models of Hugging Face transformers on these kernels.

>>> import wmkernels.integrations.transformers as t
>>> t.enable()
>>> t.disable()
"""

from wmkernels.integrations.transformers.switch import Report as Report
from wmkernels.integrations.transformers.switch import disable as disable
from wmkernels.integrations.transformers.switch import enable as enable
from wmkernels.integrations.transformers.switch import report as report

__all__ = ["Report", "disable", "enable", "report"]
