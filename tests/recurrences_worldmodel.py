"""The memories of the world model, for the laws of tests/core/test_laws.py.

The rotated blocks are in recurrences_nn.py; stacks of all of them are held against their rollouts in float64 by
test_worldmodel_model.py, since the norms between their blocks make large numbers of small differences.
"""

from recurrences import ModuleRecurrence, register

from worldmodel.model.blocks import GRU, GatedConv, MapLSTM

# Those without an op of their own are checked on the devices of any.
register(ModuleRecurrence("GatedConv", "linear_scan", lambda width: GatedConv(width, 3, 2), widths=(2, 5)))
register(ModuleRecurrence("MapLSTM", "conv_lstm", lambda width: MapLSTM(width, (2, 3), 3), widths=(6, 12)))
register(ModuleRecurrence("GRU", "linear_scan", GRU, widths=(2, 5)))
