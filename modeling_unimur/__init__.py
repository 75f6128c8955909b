"""UniMuR: unified embeddings for multimodal retrieval via frozen LLMs."""

from transformers import AutoModel, AutoProcessor

from .configuration_unimur import UniMuRConfig
from .milvus_unimur import MilvusPool
from .modeling_unimur import UniMuRModel, UniMuROutput
from .pool_unimur import Candidate, CandidatePool, Retrieval
from .processing_unimur import UniMuRProcessor

# With this package installed, transformers' Auto classes need no remote code.
AutoModel.register(UniMuRConfig, UniMuRModel, exist_ok=True)
AutoProcessor.register(UniMuRConfig, UniMuRProcessor, exist_ok=True)
# What save_pretrained writes then loads elsewhere with trust_remote_code, without this package.
UniMuRConfig.register_for_auto_class()
UniMuRModel.register_for_auto_class("AutoModel")
UniMuRProcessor.register_for_auto_class()

__all__ = [
    "Candidate",
    "CandidatePool",
    "MilvusPool",
    "Retrieval",
    "UniMuRConfig",
    "UniMuRModel",
    "UniMuROutput",
    "UniMuRProcessor",
]
