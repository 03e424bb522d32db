"""A DICOM node that finds liver lesions on CT and answers with DICOM SEG and a structured report.

A CT comes in at the left door and findings leave at the right. A room knows the room it receives
from, never the one it hands to. Two wings on one foundation: the science wing never hears of the
network, the store or the config file; the plumbing wing never hears of voxels. They meet only in
`assembly` and `worker`. The import map (a test reads it; a room may import what stands right of the arrow):

    errors                 <-
    uids                   <-
    criteria               <-
    codes                  <-
    settings               <-
    config                 <- errors settings criteria
    volume                 <- uids
    series                 <- errors uids volume
    selection              <- errors series
    regrid                 <- volume
    nifti                  <- errors volume
    models                 <- errors
    pipelines              <- errors uids volume
    pipelines.nnunet       <- errors volume models pipelines regrid
    pipelines.demo         <- errors volume models pipelines pipelines.nnunet regrid
    pipelines.given_masks  <- errors volume nifti pipelines regrid uids
    findings               <- errors uids criteria volume pipelines
    dicom_result           <- errors uids volume findings pipelines codes
    dicom_seg              <- errors uids volume findings pipelines codes dicom_result
    dicom_sr               <- errors uids criteria volume findings pipelines codes dicom_result dicom_seg
    dicom_ct               <- errors uids volume
    picture                <- volume findings dicom_result
    phantom                <- uids volume dicom_ct nifti
    store_rows             <-
    store_transaction      <- errors store_rows
    store_queries          <- errors store_rows store_transaction
    store                  <- errors store_rows store_transaction store_queries
    listener               <- errors settings log durable store
    assembly               <- errors settings log uids series selection store
    worker                 <- errors settings store uids volume series selection pipelines findings criteria dicom_result dicom_seg dicom_sr picture nifti dicom_ct
    delivery               <- errors settings store
    node                   <- errors settings config store listener assembly worker delivery
    demo                   <- errors settings store phantom volume findings picture nifti series pipelines pipelines.given_masks
    cli                    <- errors settings config criteria store node worker delivery demo pipelines uids findings
    __main__               <- cli
"""

__version__ = "0.1.0"
