class MilvusPool:
    pass
