"""The benchmark of the ConvLSTM: problems, contenders, what is measured, and how it is shown."""
