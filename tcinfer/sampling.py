from tcinfer.sampler import Sampling  # noqa

parsed = None
