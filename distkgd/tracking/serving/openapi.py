"""What an endpoint takes and gives as an OpenAPI document: openapi.json beside a registered model, and in docs/."""

import json
from typing import Any

from distkgd.common.version import __version__
from distkgd.tracking.serving.questions import KEYS

TEXTS = {"type": "array", "items": {"type": "string"}}
ANSWER: dict[str, dict[str, Any]] = {
    "head": {"type": "string", "description": "As the model knows it; so relation and tail."},
    "relation": {"type": "string"},
    "tail": {"type": "string"},
    "asked": {"enum": ["head", "relation", "tail"], "description": "What the answers are."},
    "names": TEXTS | {"description": "Of the answers, best first."},
    "labels": TEXTS | {"description": "Likewise, where the model has labels."},
    "ids": {"type": "array", "items": {"type": "integer"}, "description": "Rows of the answers."},
    "scores": {"type": "array", "items": {"type": "number"}, "description": "Higher is better."},
    "error": {"type": "string", "description": "In place of all others: why this question has no answer."},
}


def openapi_text() -> str:
    """The document as JSON."""
    return json.dumps(openapi(), indent=2) + "\n"


def openapi() -> dict[str, Any]:
    """The document, ready for JSON."""
    several: dict[str, Any] = {"type": "array", "items": {"$ref": "#/components/schemas/Question"}}
    body: dict[str, Any] = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False}
    body |= {"properties": {"inputs": several, "dataframe_records": several, "dataframe_split": {"type": "object"}}}
    given: dict[str, Any] = {"type": "object", "required": ["predictions"]}
    given |= {"properties": {"predictions": {"type": "array", "items": {"$ref": "#/components/schemas/Answer"}}}}
    refused = {"type": "object", "properties": {"error_code": {"type": "string"}, "message": {"type": "string"}}}
    ready = {"200": {"description": "The model is loaded."}}
    question: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": KEYS}
    question |= {
        "anyOf": [{"required": pair} for pair in (["head", "relation"], ["relation", "tail"], ["head", "tail"])]
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Link prediction by distkgd, served by MLflow", "version": __version__},
        "paths": {
            "/invocations": {
                "post": {
                    "summary": "Answers questions, of which each leaves out head, relation or tail.",
                    "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
                    "responses": {
                        "200": {
                            "description": "One answer per question, in order.",
                            "content": {"application/json": {"schema": given}},
                        },
                        "400": {
                            "description": "No question could be answered; the message is why the first one could not.",
                            "content": {"application/json": {"schema": refused}},
                        },
                    },
                }
            },
            **{path: {"get": {"summary": "Health.", "responses": ready}} for path in ("/ping", "/health")},
            "/version": {"get": {"summary": "MLflow's version.", "responses": {"200": {"description": "A text."}}}},
        },
        "components": {
            "schemas": {"Question": question, "Answer": {"type": "object", "properties": ANSWER}},
        },
    }
