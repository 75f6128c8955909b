"""UniMuR: unified embeddings for multimodal retrieval via frozen LLMs."""

from transformers import AutoModel, AutoProcessor

from .configuration_unimur import UniMuRConfig
from .conversation_unimur import Conversation
from .images_unimur import BadImageError
from .modeling_unimur import UniMuRModel, UniMuROutput
from .pool_milvus import MilvusPool
from .pool_unimur import Candidate, CandidatePool, Retrieval
from .processing_unimur import UniMuRProcessor

__version__ = "0.1.0"

# With this package installed, transformers' Auto classes need no remote code.
AutoModel.register(UniMuRConfig, UniMuRModel, exist_ok=True)
AutoProcessor.register(UniMuRConfig, UniMuRProcessor, exist_ok=True)

__all__ = [
    "BadImageError",
    "Candidate",
    "CandidatePool",
    "Conversation",
    "MilvusPool",
    "Retrieval",
    "UniMuRConfig",
    "UniMuRModel",
    "UniMuROutput",
    "UniMuRProcessor",
]
