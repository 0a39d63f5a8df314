"""The world model's memories in tests/core/test_laws.py.

Norms between blocks amplify rounding, so test_worldmodel_model.py tests stacks in float64.
"""

from recurrences import ModuleRecurrence, register

from worldmodel.model.recurrent import GRU, LSTM, GatedConv, MapLSTM

register(ModuleRecurrence("GatedConv", "linear_scan", lambda width: GatedConv(width, 3, 2), widths=(2, 5)))
register(ModuleRecurrence("MapLSTM", "conv_lstm", lambda width: MapLSTM(width, (2, 3), 3), widths=(6, 12)))
register(ModuleRecurrence("GRU", "linear_scan", GRU, widths=(2, 5)))
register(ModuleRecurrence("LSTM", "linear_scan", LSTM, widths=(2, 5)))
