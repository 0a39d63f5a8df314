#include "../conv_lstm.h"
namespace wmk::WMK_ISA {
int64_t conv_lstm_backward_workspace(const wmk_conv_lstm&) { return 0; }
int conv_lstm_backward(const wmk_conv_lstm&) { return WMK_UNSUPPORTED; }
}
