"""The loader that models in MLflow name if they were logged before the folders were drawn anew."""

from ddpm_ray.tracking.pyfunc_model import _load_pyfunc as _load_pyfunc
