"""What ships as configuration: the example meshes. Data only; `tollhouse up` runs `conf/examples/shop` unless told otherwise."""
