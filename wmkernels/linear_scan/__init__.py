"""The linear scan: reference, kernels and public function."""
