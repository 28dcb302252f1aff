//! The table of routes, and what is shared between handlers.

use std::future::Future;
use std::ops::Deref;
use std::rc::Rc;
use std::time::Instant;

use axum::Router;
use axum::http::{Method, StatusCode};
use axum::routing::{MethodRouter, delete, get, post};
use drava_protocol::ErrorCode;
use send_wrapper::SendWrapper;

use super::admin::Admin;
use super::problem::Problem;
use super::server::{HttpConfig, HttpCounters};
use super::{damage, health, metrics, openapi, page, topics};

/// What handlers share. axum wants its state `Send`; it never leaves the executor's thread, and the wrapper checks that.
#[derive(Clone)]
pub struct Shared {
    app: SendWrapper<Rc<App>>,
}

pub struct App {
    pub admin: Rc<dyn Admin>,
    pub config: HttpConfig,
    pub counters: Rc<HttpCounters>,
    pub started_at: Instant,
}

impl Shared {
    pub fn new(app: App) -> Self {
        Shared { app: SendWrapper::new(Rc::new(app)) }
    }
}

impl Deref for Shared {
    type Target = App;

    fn deref(&self) -> &App {
        &self.app
    }
}

/// Every route: its method, its path as the router writes it, and its handler.
pub fn routes() -> Vec<(Method, &'static str, MethodRouter<Shared>)> {
    vec![
        (Method::GET, "/", get(page::index)),
        (Method::GET, "/healthz", get(health::healthz)),
        (Method::GET, "/readyz", get(health::readyz)),
        (Method::GET, "/metrics", get(metrics::metrics)),
        (Method::GET, "/openapi.json", get(openapi::document)),
        (Method::GET, "/v1/topics", get(topics::list)),
        (Method::POST, "/v1/topics", post(topics::create)),
        (Method::GET, "/v1/topics/{*name}", get(topics::describe)),
        (Method::DELETE, "/v1/topics/{*name}", delete(topics::remove)),
        (Method::GET, "/v1/lookup", get(topics::lookup)),
        (Method::GET, "/v1/damage", get(damage::list)),
    ]
}

pub fn router(shared: Shared) -> Router {
    routes()
        .into_iter()
        .fold(Router::new(), |router, (_, path, handler)| router.route(path, handler))
        .fallback(async || {
            Problem::with_status(StatusCode::NOT_FOUND, ErrorCode::InvalidArgument, "no such path; GET / lists them")
        })
        .method_not_allowed_fallback(async || {
            Problem::with_status(
                StatusCode::METHOD_NOT_ALLOWED,
                ErrorCode::InvalidArgument,
                "the path does not have this method; the `allow` header lists those that it has",
            )
        })
        .with_state(shared)
}

/// Makes a future of this executor one that axum takes. The wrapper checks that it stays on its thread.
pub fn local<F: Future>(future: F) -> SendWrapper<F> {
    SendWrapper::new(future)
}
