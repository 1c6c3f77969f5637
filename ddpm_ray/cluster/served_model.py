"""The loader that models in MLflow name if an earlier version logged them."""

from ddpm_ray.tracking.pyfunc_model import _load_pyfunc as _load_pyfunc
