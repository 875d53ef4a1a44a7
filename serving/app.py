"""The builders of the fleet's Serve applications: `serving.app:build_category` and `:build_root`.

Serve calls them with the `args` of its configuration. What is expensive happens in the replicas,
when Serve calls the inner functions there.
"""

from collections.abc import Mapping
from typing import Literal

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from apt_ray.config import Settings
from serving.ingress import create_api
from serving.root import create_root_api
from serving.settings import Auth, Batching, CategoryName, Decision, HttpLimits

CATEGORY_DEPLOYMENT = "Inspector"
ROOT_DEPLOYMENT = "Root"
ROOT = "root"
# A prompt set that cannot be loaded now will not load in a minute: say so instead of trying on.
_CONSTRUCTOR_RETRIES = 2


class CategoryArgs(Settings):
    """All that the application of one category is built from."""

    category: CategoryName
    version: int
    tracking_uri: str
    decision: Decision
    device: Literal["cpu", "cuda"]
    batching: Batching
    http: HttpLimits
    auth: Auth


class RootArgs(Settings):
    """All that the root application is built from."""

    categories: tuple[CategoryName, ...]
    http: HttpLimits
    auth: Auth


def application_name(category: str) -> str:
    """The Serve application of a category."""
    return f"category-{category}"


def build_category(args: CategoryArgs) -> Application:
    """A pool of one category: every replica is inspector and HTTP server in one."""

    def build_api() -> FastAPI:
        from serving.inspector import Inspector  # torch and MLflow: for replicas only

        inspector = Inspector.load(
            args.category,
            str(args.version),
            tracking_uri=args.tracking_uri,
            decision=args.decision,
            device=args.device,
            limits=args.http.image,
            batching=args.batching,
        )
        return create_api(inspector, http=args.http, auth=args.auth)

    deployment = serve.deployment(
        name=CATEGORY_DEPLOYMENT, max_constructor_retry_count=_CONSTRUCTOR_RETRIES
    )
    return deployment(serve.ingress(build_api)()).bind()


def build_root(args: RootArgs) -> Application:
    """The fleet's front page, lists and health."""

    def statuses() -> Mapping[str, str]:
        applications = serve.status().applications
        return {
            category: applications[name].status.value
            for category in args.categories
            if (name := application_name(category)) in applications
        }

    def build_api() -> FastAPI:
        return create_root_api(args.categories, statuses, http=args.http, auth=args.auth)

    return serve.deployment(name=ROOT_DEPLOYMENT)(serve.ingress(build_api)()).bind()
