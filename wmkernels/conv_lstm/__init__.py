"""The convolutional LSTM: h_t = o ∘ tanh(c_t) on maps, the gates being convolutions of x_t and h_{t-1}."""
