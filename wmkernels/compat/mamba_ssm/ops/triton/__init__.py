"""Functions that mamba_ssm has in Triton; here they run where wmkernels runs."""
