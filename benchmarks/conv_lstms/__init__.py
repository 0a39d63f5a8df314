"""``conv_lstm_speed.py``: problems, implementations, plan, targets, tables, chart."""
