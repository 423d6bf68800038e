from speedstack.support.near_miss import did_you_mean, nearest


def test_the_nearest_name_is_said() -> None:
    known = ["resident", "reference", "graph"]
    assert did_you_mean("resdent", known) == "; did you mean 'resident'?"
    assert did_you_mean("cpu", known) == ""
    assert nearest("referent", known, num_names=2) == ["reference", "resident"]
    assert nearest("g", known) == [] and nearest("g", known, cutoff=0.2) == ["graph"]
