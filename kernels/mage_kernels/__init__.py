"""Triton kernels of mage_tune, one folder per operation; they know nothing of mage_tune."""
