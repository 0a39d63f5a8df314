"""Modules of ``conv_lstm_speed.py``."""
