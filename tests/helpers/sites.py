"""Sites that differ from a committed one."""

from launch.config.sites import Site


def changed_site(site: Site, **slurm: object) -> Site:
    """A site with other settings of its scheduler."""
    tree = site.model_dump(mode="json")
    tree["slurm"] |= slurm
    return Site.model_validate(tree)
