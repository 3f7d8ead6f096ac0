"""What nets cost, counted (`cost`), and what they take on this machine, measured (`seconds`).

    names, patterns, runs -> Net (`nets`) -> Measured (`cost`)   -> tables, or one line of JSON
                                          -> Report (`seconds`)  -> tables, a picture, one line of JSON

`seconds` asks workers (`worker`), one process for each runtime (`runtimes`) and number of threads, one at a time.
"""
